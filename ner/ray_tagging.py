"""Tags many files on one machine or many, through Ray Data: `predict.py --ray --input 'PATTERN' --output FOLDER`.

The files are cut into shards by bytes (text, JSON Lines) or row groups (Parquet). A pool of actors, each with a loaded
tagger, takes a shard at a time, reads it where it lies and writes one file of results, whole or not at all. So a killed
worker costs the shard it was on, and a run that was stopped goes on with the shards that are missing. Ray is optional:
`pip install "ray[data]"`. All machines need the same files under the same paths.
"""

import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ner import files
from ner.errors import UserError
from ner.paths import ROOT
from ner.shards import Shard, plan, texts_of

log = logging.getLogger("ner.ray_tagging")
PLAN = "shards.json"  # in the output folder: what was cut how
HOST_AND_PORT = re.compile(r"\[?([^/\[\]]+)\]?:(\d{1,5})")
CONNECT_SECONDS = 10
RETRIES = 5  # of a shard whose worker dies; one that kills every worker ends the run


@dataclass(frozen=True)
class Settings:
    """How each actor tags; see ner.predictor.load."""

    run: str
    engine: str
    precision: str
    batch_size: int
    threads: int


def tag(pattern: str, output: Path, settings: Settings, form: str, workers: int | None, address: str) -> int:
    """Tag all files that match and return the number of texts. Shards whose results are there are left out.

    form: "jsonl" or "parquet", what is written. workers: actors; as many as the cluster has room for where None.
    address: of a Ray cluster, "" for the one that RAY_ADDRESS names, else one on this machine. Raises UserError.
    """
    ray = _import_ray()
    shards = _planned(plan(pattern, form), output, settings)
    missing = [shard for shard in shards if not (output / shard.output).exists()]
    if len(missing) < len(shards):
        log.warning("%d of %d shards are in %s already", len(shards) - len(missing), len(shards), output)
    if not missing:
        return 0
    _connect(ray, address, settings)
    tagged = _tagged(ray, missing, output, settings, form, workers)
    texts, damaged = 0, []
    try:
        for row in tagged.iter_rows():
            texts += int(row["texts"])
            damaged += [row["damaged"]] if row["damaged"] else []
    except ray.exceptions.RayError as error:
        raise UserError(f"a shard could not be tagged: {_reason(error)}; whole shards stay in {output}") from None
    for what in sorted(damaged):
        log.warning("%s", what)
    for leftover in output.glob(f".part-*{files.WRITING}*"):  # of killed workers, now that all shards are whole
        with contextlib.suppress(OSError):
            leftover.unlink()
    return texts


def _reason(error: Exception) -> str:
    """Return the last line of the worker's traceback, after which Ray Data puts a traceback and advice of its own."""
    traceback = str(error).partition("\n\nThe above exception was the direct cause")[0]
    return traceback.strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")


def _connect(ray: Any, address: str, settings: Settings) -> None:
    """Join the cluster, or start one on this machine. Raises UserError where it cannot be reached."""
    # Left to itself, ray.init would also join what an earlier `ray start` on this machine has left a note of.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_reachable(address)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(settings.threads)}
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": environment},
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--ray {address}: no Ray cluster can be reached there ({reason})") from None
    ray.data.DataContext.get_current().enable_progress_bars = False


def _check_reachable(address: str) -> None:
    """Raise UserError where nothing listens at HOST:PORT: Ray itself would go on trying for minutes."""
    if not (match := HOST_AND_PORT.fullmatch(address)):
        return
    try:
        socket.create_connection((match[1], int(match[2])), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--ray {address}: no Ray cluster can be reached there ({reason})") from None


def _tagged(ray: Any, shards: list[Shard], output: Path, settings: Settings, form: str, workers: int | None) -> Any:
    """Return a data set of a row a shard, which tags the shards as it is read. Raises UserError."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 1 if settings.engine != "onnx" and any(machine.get("GPU", 0) >= 1 for machine in machines) else 0
    room = sum(int(m.get("GPU", 0)) if gpus else int(m.get("CPU", 0)) // settings.threads for m in machines)
    if not workers and not room:
        raise UserError(
            f"--threads {settings.threads}: no machine of the cluster has that many cores; give fewer, or --workers "
            "where the cluster grows when it is asked to"
        )
    size = min(workers or room, len(shards))
    rows = ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards))
    return rows.map_batches(
        ShardTagger,
        fn_constructor_args=(settings, str(output), form),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        num_cpus=settings.threads,
        num_gpus=gpus,
        max_task_retries=RETRIES,
    )


class ShardTagger:
    """An actor: a loaded tagger that turns shards into files."""

    def __init__(self, settings: Settings, output: str, form: str):
        from ner import predictor

        self.predictor = predictor.load(
            settings.run, settings.batch_size, settings.precision, settings.engine, settings.threads
        )
        self.output, self.form = Path(output), form

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Tag the one shard of a batch, a column a field; return the number of its texts and what was damaged."""
        shard = Shard(**{name: getattr(column[0], "item", lambda c=column: c[0])() for name, column in batch.items()})
        count, damaged = 0, list[int]()
        with files.replacing(self.output / shard.output) as temporary, _writer(temporary, self.form) as write:
            for rows in self._rows(shard, damaged):
                write(rows)
                count += len(rows)
        what = f"{shard.file}:{damaged[0]}: not {shard.encoding}; what does not fit became \ufffd in" if damaged else ""
        return {"texts": [count], "damaged": [f"{what} {len(damaged)} lines of {shard.output}" if damaged else ""]}

    def _rows(self, shard: Shard, damaged: list[int]) -> Iterator[list[dict]]:
        """Yield the results of a shard in lists of bounded size."""
        from ner.texts import chunks
        from ner.writers import record

        line = shard.first_line
        for chunk in chunks(texts_of(shard, damaged)):
            results = self.predictor.results(chunk)
            yield [record(result) | {"file": shard.file, "line": line + index} for index, result in enumerate(results)]
            line += len(chunk)


def _planned(shards: list[Shard], output: Path, settings: Settings) -> list[Shard]:
    """Return the shards, noted in the output folder. Raises UserError where another plan was begun there."""
    plan_now = {"run": settings.run, "shards": [asdict(shard) for shard in shards]}
    file = output / PLAN
    if output.is_file():
        raise UserError(f"{output}: is a file; --ray writes a folder, name a new one")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            if json.loads(file.read_text("utf-8")) != plan_now:
                raise UserError(
                    f"{output}: holds results of another run, other files or files that have changed; name a new folder"
                )
        elif any(output.iterdir()):
            raise UserError(f"{output}: is not empty and holds no {PLAN}; name a new folder")
        else:
            files.write_text(file, json.dumps(plan_now, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{error.filename or output}: cannot be written ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{file}: is damaged; name a new folder") from None
    return shards


@contextlib.contextmanager
def _writer(path: Path, form: str) -> Iterator[Callable[[list[dict]], None]]:
    """Open a function that writes lists of results to a JSON Lines or Parquet file."""
    if form == "jsonl":
        from ner.writers import as_json

        with open(path, "w", encoding="utf-8", newline="\n") as file:
            yield lambda rows: file.writelines(as_json(row, row["text"]) + "\n" for row in rows)
        return
    import pyarrow
    from pyarrow import parquet

    from ner.predictor import LONE_SURROGATE

    text, number = pyarrow.string(), pyarrow.int64()
    entity = {"text": text, "type": text, "start": number, "end": number, "score": pyarrow.float64()}
    columns = {"text": text, "entities": pyarrow.list_(pyarrow.struct(list(entity.items())))}
    schema = pyarrow.schema(list((columns | {"file": text, "line": number}).items()))

    def write(rows: list[dict]) -> None:
        for row in rows:  # Parquet holds UTF-8, which half a surrogate pair has not
            for holder in (row, *row["entities"]):
                holder["text"] = LONE_SURROGATE.sub("\ufffd", holder["text"])
        table.write_table(pyarrow.Table.from_pylist(rows, schema))

    with parquet.ParquetWriter(path, schema) as table:
        yield write


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f'--ray needs Ray Data ({error}): pip install "ray[data]"') from None
    return ray

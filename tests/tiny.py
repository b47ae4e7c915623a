"""Tiny tokenizers, encoders and corpora, built in code so that tests need no download. The same on every call."""

import random
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = """1998年3月，江泽民在北京会见了比尔·盖茨。
上海市政府昨日宣布，将与联合国教科文组织合作。
张伟说：“我们公司在香港有五家分店！”王芳没有回答。
李娜出生于武汉，现在住在深圳；她每周去广州一次。
据新华社报道，中国人民银行行长周小川今天访问了东京大学。
The inhibitor of IL-2 blocks NF-kappa B binding in human T-cells (see Fig. 3).
John Smith lives in New York and works for the United Nations.
"""
PEOPLE = ["江泽民", "张伟", "王芳", "李娜", "周小川", "比尔·盖茨"]
PLACES = ["北京", "上海", "香港", "武汉", "深圳", "广州"]
GROUPS = ["联合国", "新华社", "中国人民银行", "东京大学"]
PATTERNS = [
    "{PER}在{LOC}会见了{PER}。",
    "{ORG}昨日宣布，将与{ORG}合作。",
    "{PER}出生于{LOC}，现在住在{LOC}；",
    "据{ORG}报道，{PER}今天访问了{LOC}",
    "我们公司在{LOC}有五家分店！",
    "她没有回答。",
]
BERT_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
ROBERTA_TOKENS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
}


def wordpiece(folder=None, text: str = TEXT) -> PreTrainedTokenizerFast:
    """WordPiece as BERT has it: lower case, white space and control characters dropped, single ideographs."""
    characters = sorted(set(text.lower()) - {" ", "\n"})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + c for c in characters if c.isascii())]
    pieces += ["the", "in", "##ing", "human"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return _finish(tokenizer, folder, BERT_TOKENS)


def sentencepiece(folder=None, text: str = TEXT) -> PreTrainedTokenizerFast:
    """SentencePiece Unigram with the ▁ of metaspace, as XLM-R has it; ▁ alone is a piece too."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = ["▁", *sorted(set(text) - {" ", "\n"}), "▁the", "▁in", "▁of", "ing", "中国", "▁上海", "北京"]
    scores = [(piece, 0.0) for piece in specials] + [(piece, -5.0 - len(piece) / 10) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
    return _finish(tokenizer, folder, ROBERTA_TOKENS)


def bytelevel(folder=None, text: str = TEXT, add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as RoBERTa and GPT-2 have it: no character is unknown, many become two to four tokens."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=add_prefix_space)
    return _finish(tokenizer, folder, ROBERTA_TOKENS)


def _finish(tokenizer, folder, specials: dict[str, str]) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **specials)
    if folder is not None:
        fast.save_pretrained(folder)
    return fast


def encoder(folder, tokenizer=None, positions: int = 128, seed: int = 0) -> Path:
    """Saves a random BERT (hidden 32, 2 layers, 2 heads) and its tokenizer (WordPiece if none is given) in `folder`."""
    import torch
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar on stderr would fail tests that look at it

    tokenizer = tokenizer or wordpiece()
    settings = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def sentences(count: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """`count` easy sentences as (characters, IOB2 tags) with the types PER, LOC and ORG: a model can learn them."""
    draw = random.Random(seed)
    names = {"PER": PEOPLE, "LOC": PLACES, "ORG": GROUPS}
    made = []
    for _ in range(count):
        chars, tags = [], []
        for part in draw.choice(PATTERNS).replace("}", "{").split("{"):
            if part in names:
                name = draw.choice(names[part])
                chars += name
                tags += ["B-" + part] + ["I-" + part] * (len(name) - 1)
            else:
                chars += part
                tags += ["O"] * len(part)
        made.append((chars, tags))
    return made


def corpus(path, count: int, seed: int = 0) -> Path:
    """Writes `count` such sentences as a BIO file at `path`."""
    blocks = ("".join(f"{c} {t}\n" for c, t in zip(*sentence, strict=True)) for sentence in sentences(count, seed))
    Path(path).write_text("\n".join(blocks), encoding="utf-8")
    return Path(path)

"""The tokens of a padded batch without the padding, and where each stands for attention.

Linear layers, norms and activations look at one token at a time, so padding in them is wasted work: they see one
matrix of tokens. Attention looks at whole sentences, so it sees the same tokens by sentence and head, in blocks of
sentences of like length.
"""

from dataclasses import dataclass

import torch

ROW_MULTIPLE = 32  # rows of the packed matrix: oneDNN compiles a product for each number of rows
LENGTH_MULTIPLE = 8  # lengths of blocks, for the same reason
MAX_SCORES = 1 << 19  # attention scores of a block, unless one sentence has more: they stay in the caches


@dataclass(slots=True)
class Block:
    """Sentences of like length whose attention is computed together."""

    begin: int  # the block's first place in the layout by head
    end: int
    sequences: int  # sentences × heads
    length: int  # tokens of a sentence, padding included
    bias: torch.Tensor  # [sequences, 1, length], added to the scores: 0 for a token, a large negative for padding


class PackedBatch:
    """Index maps between three layouts of a batch's tokens.

    padded:  [sentences, length, hidden], as transformers has it
    packed:  [rows, hidden], only the real tokens, sentence after sentence; a multiple of ROW_MULTIPLE rows of which at
             least the last is spare. Spare rows repeat the first token; nothing reads them but the padding of a block,
             whose gradient is zero, so theirs is zero all the way down.
    by head: [places, head_size], block after block, in each sentence after sentence, head after head, token after token
    """

    def __init__(self, real: torch.Tensor, heads: int):
        """real: bool [sentences, length], False where the batch is padded."""
        self.heads, self.padded_shape = heads, real.shape
        self.tokens = real.flatten().nonzero().squeeze(1)  # [tokens], their places in the padded batch
        self.rows = (len(self.tokens) // ROW_MULTIPLE + 1) * ROW_MULTIPLE
        spare = self.tokens.new_zeros(self.rows - len(self.tokens))
        self._source = torch.cat([self.tokens, spare])  # [rows]
        self.blocks: list[Block] = []
        self._set_maps(self._make_blocks(real.sum(1)))

    def _make_blocks(self, counts: torch.Tensor) -> torch.Tensor:
        """Group the sentences, longest first; return the index [places] of each place in [rows × heads].

        counts: int64 [sentences], tokens of each.
        """
        starts = counts.cumsum(0) - counts  # each sentence's first row
        order = counts.argsort(descending=True, stable=True)
        lengths = counts[order].tolist()
        head = torch.arange(self.heads)[:, None]
        index: list[torch.Tensor] = []
        done = begin = 0  # sentences that are in a block, and their places
        while done < len(lengths):
            length = max(1, -(-lengths[done] // LENGTH_MULTIPLE)) * LENGTH_MULTIPLE
            fitting = max(1, MAX_SCORES // (self.heads * length * length))
            size = 1 << min(fitting, len(lengths) - done).bit_length() - 1  # sentences; a power of two, so few shapes
            chosen = order[done : done + size]
            place = torch.arange(length)  # of a token in its sentence
            is_token = place < counts[chosen, None]  # [size, length]
            row = torch.where(is_token, starts[chosen, None] + place, self.rows - 1)  # [size, length]
            index.append((row[:, None] * self.heads + head).flatten())  # of [size, heads, length]
            # float16's minimum is a number in every type
            bias = torch.zeros(row.shape).masked_fill_(~is_token, torch.finfo(torch.float16).min)
            end = begin + len(index[-1])
            self.blocks.append(
                Block(begin, end, size * self.heads, length, bias.repeat_interleave(self.heads, 0)[:, None])
            )
            begin, done = end, done + size
        return torch.cat(index)

    def _set_maps(self, by_head: torch.Tensor) -> None:
        """Set the index maps between the packed layout and the one by head.

        by_head: int64 [places], for each place by head the index in [rows × heads] of what stands there.
        """
        part = torch.arange(3)[:, None]  # query, key, value, side by side in a row of the joined product
        row, head = by_head // self.heads, by_head % self.heads  # [places] each
        self.by_head = by_head
        self.qkv_by_head = (row * 3 * self.heads + part * self.heads + head).flatten()  # of [rows × 3 × heads]
        places = len(by_head)
        by_row = torch.zeros(self.rows * self.heads, dtype=torch.long)
        by_row.index_copy_(0, by_head, torch.arange(places))
        by_row = by_row.view(self.rows, 1, self.heads)
        by_row[-1] = 0  # the last row stands at every padded place; any one will do
        self.by_row = by_row.flatten()  # of [places]
        self.qkv_by_row = (by_row + part * places).flatten()  # [rows × 3 × heads], of [3 × places]

    def pack(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [sentences, length, hidden] as [rows, hidden]."""
        return hidden.flatten(0, 1).index_select(0, self._source)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """Return [rows, hidden] as [sentences, length, hidden], with zeros at the padding."""
        flat = x.new_zeros(self.padded_shape.numel(), x.shape[1])
        return flat.index_copy(0, self.tokens, x[: len(self.tokens)]).view(*self.padded_shape, -1)

"""What makes a training step and a tagging pass as fast as the machine allows, and nothing else.

Each piece computes what the plain one does, up to rounding; tests/test_fast.py holds it to that, and
benchmarks/ shows what each is for. The trade-off: weights live in the compute type (bfloat16 where the
hardware multiplies it natively), and the optimizer works on float32 copies of those that train. That costs
six bytes a trained weight more than autocast's scheme and saves converting every weight at every step.
"""

import contextlib
import ctypes
import functools
import os
import sys

import torch
from torch import nn

# Of compiled products; 1024 by default, which the shapes of an epoch's batches exceed, so that each is compiled again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MADV_HUGEPAGE = -1, -3, 14  # of malloc.h and sys/mman.h
NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(precision, device):
    """Picks the type to compute in.

    precision: "auto" or a key of NAMES; device: a torch.device or its name. Returns (torch.dtype, reason)."""
    if precision != "auto":
        return NAMES[precision], "as configured"
    device = torch.device(device)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies bfloat16 natively"
        return torch.float16, "this GPU has no native bfloat16"
    if device.type == "cpu":
        # Emulated bfloat16 is slower than float32, so only native instructions count.
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "this CPU multiplies bfloat16 natively"
        return torch.float32, "this CPU has no native bfloat16"
    return torch.float32, f"nothing faster is known to be safe on {device.type}"


@functools.cache
def hold_memory():
    """Has glibc keep what is freed for what comes next, and Linux back the next 2 GB of its heap by huge pages.

    A step takes and frees hundreds of megabytes: by pages of 4 kB it took up to a tenth longer, with 300,000 faults in
    the first epoch. Does nothing with another C library."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        with open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") as file:
            page = int(file.read())
        if page > 2 << 20:  # some ARM systems have pages of 512 MB, far more than a step takes
            return
        libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
        begin = -(-libc.sbrk(0) // page) * page
        blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(31 << 20))) for _ in range(64)]  # the heap grows by them
        if (size := libc.sbrk(0) - begin) > 0:
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), MADV_HUGEPAGE)
        for block in blocks:
            libc.free(block)


def attention(device):
    """The attention implementation to load a model with: PyTorch's fused one is slow backward on CPUs."""
    return "eager" if torch.device(device).type == "cpu" else "sdpa"


class Frozen:
    """Weights that training leaves as they are, the rows of one below those of another, as a CPU's products take them.

    oneDNN lays out a weight anew for each product, a fifth of the time of a small one. Here that is done once for the
    weight, once for its transpose (for the gradient of the input), and again when the weight is another, or was changed:
    but for a change through `.data`, which leaves no trace, unless an adapter came or went with it."""

    def __init__(self):
        self.known = self.weights = self.straight = self.transposed = self.zeros = None

    def of(self, weights, adapted):
        """self, with these weights [out, in] of one dtype; None where they train or have no layout of their own.

        adapted: whether they are under an adapter."""
        if any(weight.requires_grad for weight in weights) or not self.fits(weights[0]):
            return None
        known = adapted, [(weight.data_ptr(), weight._version) for weight in weights]
        if known != self.known:
            # Held on to, so that no other weight comes to lie where they do.
            self.known, self.weights = known, [weight.detach() for weight in weights]
            self.straight, self.transposed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(self.weights), None), None
        return self

    @staticmethod
    def fits(weight):
        return (weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
                and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
                and weight.dtype in {torch.float32, choose("auto", "cpu")[0]})  # fmt: skip

    def product(self, x, bias):
        """x Wᵀ + b."""
        return torch.ops.mkldnn._linear_pointwise(x, self.straight, bias, "none", [], "")

    def product_back(self, dy):
        """dy W."""
        if self.transposed is None:  # tagging takes none
            whole = torch.cat(self.weights).t().contiguous()
            self.transposed = torch.ops.mkldnn._reorder_linear_weight(whole, None)
            self.zeros = whole.new_zeros(len(whole))  # with a bias it is a product that a forward pass had compiled
        return torch.ops.mkldnn._linear_pointwise(dy, self.transposed, self.zeros, "none", [], "")


class LowRankProduct(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ (LoRA, Hu et al. 2021, eq. 3).

    x [..., in], W [out, in] or Frozen, b [out] or None, A [r, in], B [out, r] of one dtype; s a float. Where A and B are
    None it is a plain linear layer."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        flat, low = x.reshape(-1, x.shape[-1]), None
        ctx.frozen, ctx.scale = weight if isinstance(weight, Frozen) else None, scale
        if ctx.frozen:
            y, weight = weight.product(flat, bias), None
        else:
            y = flat @ weight.t()
            y = y if bias is None else y.add_(bias)
        if a is not None:
            down, up = a.t(), b.t()
            if ctx.frozen:  # laid out as a backward pass has them, so that both share what is compiled
                down, up = down.contiguous(), up.contiguous()
            low = (flat @ down).mul_(scale)
            y.addmm_(low, up)
        ctx.save_for_backward(flat, low, weight, a, b)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        flat, low, weight, a, b = ctx.saved_tensors
        for_x, for_weight, for_bias, for_a, for_b, _ = ctx.needs_input_grad
        dy, dx, da, db = grad.reshape(-1, grad.shape[-1]), None, None, None
        if a is not None:  # first, while dy is still in the caches: after dx a step took 3% longer
            dlow = (dy @ b).mul_(ctx.scale)
            db = (low.t() @ dy).t() if for_b else None  # the quicker way round
            da = dlow.t() @ flat if for_a else None
        if for_x:
            dx = ctx.frozen.product_back(dy) if ctx.frozen else dy @ weight
            dx = (dx if a is None else dx.addmm_(dlow, a)).view(*grad.shape[:-1], -1)
        return dx, dy.t() @ flat if for_weight else None, dy.sum(0) if for_bias else None, da, db, None


def _adapter(module):
    """(A, B, s) of a peft LoRA layer of the plain kind: one adapter, no dropout, no variant, on a frozen nn.Linear.

    None for all others, and while the adapter is merged or disabled."""
    base, names = module.base_layer, module.active_adapters
    if type(base) is not nn.Linear or len(names) != 1 or module.lora_variant:
        return None
    name = names[0]
    if module.merged or module.disable_adapters or name not in module.lora_bias:  # adalora's are no two products
        return None
    trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    if trained or module.lora_bias[name] or not isinstance(module.lora_dropout[name], nn.Identity):
        return None
    return module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]


def _is_lora(module):
    return hasattr(module, "lora_variant") and hasattr(module, "base_layer")


def _fuse_lora(module):
    """Replaces the forward of one peft LoRA layer, where it is of the plain kind. Returns whether it did."""
    if _adapter(module) is None:
        return False
    plain, frozen = module.forward, Frozen()

    def forward(x, *args, **kwargs):
        product = None if args or kwargs else _joined(frozen, module)
        return plain(x, *args, **kwargs) if product is None else LowRankProduct.apply(x, *product)

    module.forward = forward
    return True


class Stack:
    """The layers of BERT and its kin, on the tokens of a batch without its padding.

    The tokens of all sentences stand in one matrix [rows, hidden], in which query, key and value are one product. Only
    attention lays them out by sentence. Weights are read from the model at each call, so that whatever happens to them
    counts; what is not known to be the same is left to transformers. Tagging keeps the padding: its batches have
    little, and its logits are then those of the plain model everywhere."""

    KINDS = {kind + "Encoder" for kind in ("Bert", "Camembert", "Electra", "Ernie", "Roberta", "XLMRoberta")}
    ROUND = 32  # rows: products are compiled for each number of them anew

    def __init__(self, encoder):
        self.encoder, self.plain = encoder, encoder.forward
        self.frozen = [[Frozen() for _ in range(4)] for _ in encoder.layer]

    @classmethod
    def fits(cls, module):
        """Whether a module is such an encoder."""
        kind = type(module)
        return kind.__name__ in cls.KINDS and kind.__module__.startswith("transformers.models.") and not any(
            layer.is_decoder or layer.add_cross_attention or layer.chunk_size_feed_forward for layer in module.layer)

    def __call__(self, hidden, attention_mask=None, position_ids=None, **others):
        odd = any(value is not None and value is not False for value in others.values())
        odd = odd or attention_mask is not None and attention_mask.ndim != 4
        products = None if odd else self._products()
        if products is None:
            return self.plain(hidden, attention_mask, position_ids=position_ids, **others)
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        heads = self.encoder.layer[0].attention.self.num_attention_heads
        real = torch.ones(hidden.shape[:2], dtype=torch.bool)
        if attention_mask is not None:  # of booleans, or a number added to the scores
            seen = attention_mask[:, 0, 0]
            real &= seen if seen.dtype == torch.bool else seen == 0
        rows = Rows(real, heads, self.ROUND, packed=self.encoder.training)
        x = rows.pack(hidden)
        for layer, (three, out, up, down) in zip(self.encoder.layer, products):
            attention = layer.attention.self
            seen = Attention.apply(LowRankProduct.apply(x, *three), rows, attention.scaling, attention.dropout)
            x = self._add(x, LowRankProduct.apply(seen, *out), layer.attention.output)
            inner = layer.intermediate.intermediate_act_fn(LowRankProduct.apply(x, *up))
            x = self._add(x, LowRankProduct.apply(inner, *down), layer.output)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=rows.unpack(x))

    def _products(self):
        """For each layer the arguments of its four products; None where a layer is not of the plain kind."""
        found = []
        for layer, (three, out, up, down) in zip(self.encoder.layer, self.frozen):
            attention = layer.attention.self
            if layer._forward_hooks or attention._forward_hooks or layer.gradient_checkpointing:  # others look on
                return None
            found.append([_joined(three, attention.query, attention.key, attention.value),
                          _joined(out, layer.attention.output.dense),
                          _joined(up, layer.intermediate.dense), _joined(down, layer.output.dense)])
            if None in found[-1]:
                return None
        return found

    @staticmethod
    def _add(x, y, output):
        norm, mask = output.LayerNorm, _drawn(output.dropout, y)
        x = x + y if mask is None else torch.addcmul(x, y, mask)
        return nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _joined(frozen, *linears):
    """(W, b, A, B, s) of linear layers that read the same input as one; None where one is not of the plain kind.

    The rows of their W, b and A stand below one another; B has those of each on its diagonal."""
    parts, scales = [], set()
    for linear in linears:
        a = b = None
        if _is_lora(linear):
            if (adapter := _adapter(linear)) is None:
                return None
            a, b, scale = adapter
            scales.add(scale)
            linear = linear.base_layer
        elif type(linear) is not nn.Linear:
            return None
        parts.append((linear.weight, linear.bias, a, b))
    if len(scales) > 1 or len({bias is None for _, bias, _, _ in parts}) > 1:
        return None
    scale = scales.pop() if scales else None
    weights, biases, down, up = zip(*parts)
    weight = frozen.of(weights, scale is not None)
    if len(parts) == 1:
        return weight or weights[0], biases[0], down[0], up[0], scale
    weight, bias = weight or torch.cat(weights), None if biases[0] is None else torch.cat(biases)
    if scale is None:
        return weight, bias, None, None, None
    up = [w.new_zeros(len(w), 0) if b is None else b for w, b in zip(weights, up)]
    return weight, bias, torch.cat([a for a in down if a is not None]), torch.block_diag(*up), scale


class Rows:
    """Where the tokens of a padded batch, `real` bool [sentences, length], stand in a matrix without padding, and by heads.

    Where it is not `packed` the padding stands in it too. The matrix has a multiple of `step` rows, at least one more than
    there are tokens. Nothing is read from the last rows but by padding, whose gradient is zero; so theirs is, all the way
    down. By heads the sentences stand in `blocks` of like length, the longest first: (begin, end, sentences x heads,
    length, what is added to the scores of the keys)."""

    SCORES = 1 << 19  # in a block, unless one sentence has more: they stay in the caches, and their memory serves the next
    LENGTHS = 8  # blocks have lengths of this step and a power of two sentences: products are compiled for each shape

    def __init__(self, real, heads, step, packed=True):
        self.shape, self.heads = real.shape, heads
        kept = real if packed else torch.ones_like(real)
        self.tokens = kept.flatten().nonzero().squeeze(1)
        count = len(self.tokens)
        rows = (count // step + 1) * step
        self.source = torch.cat([self.tokens, self.tokens.new_zeros(rows - count)])
        self.position = self.source % self.shape[1]
        seen = torch.cat([real.flatten()[self.tokens], real.new_zeros(rows - count)])
        counts = kept.sum(1)
        starts, order = counts.cumsum(0) - counts, counts.argsort(descending=True, stable=True)
        left, head, by_head, begin, self.blocks = counts[order].tolist(), torch.arange(heads)[:, None], [], 0, []
        while left:
            length = max(1, -(-left[0] // self.LENGTHS)) * self.LENGTHS
            fitting = min(len(left), max(1, self.SCORES // (heads * length * length)))
            chosen, order = order.tensor_split([1 << fitting.bit_length() - 1])
            left, at = left[len(chosen) :], torch.arange(length)
            row = torch.where(at < counts[chosen, None], starts[chosen, None] + at, rows - 1)
            by_head.append((row[:, None] * heads + head).flatten())
            mask = torch.zeros(row.shape).masked_fill_(~seen[row], torch.finfo(torch.float16).min)  # in any type
            end = begin + len(by_head[-1])
            self.blocks.append((begin, end, len(row) * heads, length, mask.repeat_interleave(heads, 0)[:, None]))
            begin = end
        self.by_head, part = torch.cat(by_head), torch.arange(3)[:, None]
        self.three_by_head = (self.by_head // heads * 2 * heads + self.by_head + part * heads).flatten()
        by_row = torch.zeros(rows * heads, dtype=torch.long).index_copy_(0, self.by_head, torch.arange(end))
        by_row = by_row.view(rows, 1, heads)
        by_row[-1] = 0  # all padding had been written there
        self.by_row, self.three_by_row = by_row.flatten(), (by_row + part * end).flatten()

    def pack(self, hidden):
        return hidden.flatten(0, 1).index_select(0, self.source)

    def unpack(self, x):
        flat = x.new_zeros(self.shape.numel(), x.shape[1])
        return flat.index_copy(0, self.tokens, x[:len(self.tokens)]).view(*self.shape, -1)


def attend(three, rows, scale, dropout=None):
    """Scaled dot-product attention of query, key and value side by side [rows, 3 x hidden], into [rows, hidden].

    Also returns what its gradient takes: the three by heads [3, places, width], and for each block the shares of each
    token [sentences x heads, length, length] and the mask that `dropout` drew for them."""
    width = three.shape[1] // (3 * rows.heads)
    parts = three.view(-1, width).index_select(0, rows.three_by_head).view(3, -1, width)
    out, shares, drawn = torch.empty_like(parts[0]), [], []
    exact = torch.promote_types(three.dtype, torch.float32)  # and twice as fast as softmax in bfloat16
    for begin, end, number, length, mask in rows.blocks:
        query, key, value = parts[:, begin:end].unflatten(1, (number, length))
        mask = mask.to(three.dtype).expand(-1, length, -1)
        scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale)
        shares.append(torch.softmax(scores, -1, dtype=exact).to(three.dtype))
        drawn.append(None if dropout is None else _drawn(dropout, shares[-1]))
        share = shares[-1] if drawn[-1] is None else shares[-1] * drawn[-1]
        torch.bmm(share, value, out=out[begin:end].view(value.shape))
    return out.index_select(0, rows.by_row).view(len(three), -1), parts, shares, drawn


class Attention(torch.autograd.Function):
    """What attend does, with its gradient."""

    @staticmethod
    def forward(ctx, three, rows, scale, dropout):
        out, parts, shares, drawn = attend(three, rows, scale, dropout)
        ctx.save_for_backward(parts, *shares, *drawn)
        ctx.rows, ctx.scale = rows, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        (parts, *saved), rows = ctx.saved_tensors, ctx.rows
        dout = grad.reshape(-1, parts.shape[-1]).index_select(0, rows.by_head)
        dparts, count = torch.empty_like(parts), len(rows.blocks)
        for (begin, end, *shape, _), share, drawn in zip(rows.blocks, saved[:count], saved[count:]):
            query, key, value = parts[:, begin:end].unflatten(1, shape)
            dquery, dkey, dvalue = dparts[:, begin:end].unflatten(1, shape)
            dblock = dout[begin:end].view(value.shape)
            dshare = torch.bmm(dblock, value.transpose(1, 2))
            if drawn is not None:
                dshare.mul_(drawn)
            dscores = torch._softmax_backward_data(dshare, share, -1, share.dtype).mul_(ctx.scale)
            torch.bmm(dscores, key, out=dquery)
            torch.bmm(dscores.transpose(1, 2), query, out=dkey)
            torch.bmm((share if drawn is None else share * drawn).transpose(1, 2), dblock, out=dvalue)
        dthree = dparts.flatten(0, 1).index_select(0, rows.three_by_row).view(len(grad), -1)
        dthree[len(rows.tokens):] = 0
        return dthree, None, None, None


class Dropout(nn.Module):
    """nn.Dropout for CPUs, where drawing a mask costs as much as a matrix product: the mask is a slice, at a
    random offset, of one drawn beforehand."""

    SIZE = 1 << 22

    def __init__(self, p):
        super().__init__()
        self.p = p
        generator = torch.Generator().manual_seed(0)
        keep = torch.rand(self.SIZE, generator=generator) >= p
        self.register_buffer("mask", keep.float() / (1 - p), persistent=False)

    def draw(self, x):
        """A mask for x, of its shape; a view where x is not too large for that."""
        count, most = x.numel(), self.SIZE // 2
        parts = [min(most, count - begin) for begin in range(0, count, most)]
        starts = torch.randint(self.SIZE - most, (len(parts),)).tolist()
        drawn = [self.mask[start:start + part] for start, part in zip(starts, parts)]
        return (drawn[0] if len(drawn) == 1 else torch.cat(drawn)).view(x.shape)

    def forward(self, x):
        return x * self.draw(x) if self.training else x


def _drawn(dropout, x):
    """The mask with which a dropout multiplies x; None where it does nothing."""
    if not dropout.training or dropout.p == 0:
        return None
    return dropout.draw(x) if isinstance(dropout, Dropout) else dropout(torch.ones_like(x))


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Scaled dot-product attention as transformers' eager one computes it, but for where its dropout is drawn.

    query, key, value [batch, heads, length, width]; returns [batch, length, heads, width] and the probabilities."""
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    share = nn.functional.softmax(scores, dim=-1)
    if dropout > 0:
        share = module.dropout(share)
    return torch.matmul(share, value).transpose(1, 2).contiguous(), share


def _draw_attention_dropout_beforehand(model):
    """Has an eager attention with an nn.Dropout of its own use that (by then a Dropout) instead of the functional."""
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("eager_drawn", _attend)
    AttentionMaskInterface.register("eager_drawn", eager_mask)
    for module in model.modules():
        config = getattr(module, "config", None)
        if (isinstance(getattr(module, "dropout", None), Dropout) and hasattr(module, "scaling")
                and getattr(config, "_attn_implementation", None) == "eager"):  # fmt: skip
            config._attn_implementation = "eager_drawn"


def prepare(model, dtype, device):
    """Readies a model in place: moved to `device`, all floating-point weights in `dtype`, LoRA layers fused, and on
    a CPU the dropout masks drawn beforehand and memory held. Returns the number of fused LoRA layers."""
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu:
        hold_memory()
    model.to(device=device, dtype=dtype)
    fused = 0
    masks = {}
    for module in list(model.modules()):
        if _is_lora(module):
            fused += _fuse_lora(module)
        if on_cpu:
            for name, child in module.named_children():
                if type(child) is nn.Dropout and child.p > 0:
                    if child.p not in masks:
                        masks[child.p] = Dropout(child.p).to(dtype).train(child.training)
                    setattr(module, name, masks[child.p])
    if on_cpu:
        for module in list(model.modules()):
            if Stack.fits(module):
                module.forward = Stack(module)
    if masks:
        _draw_attention_dropout_beforehand(model)
    return fused



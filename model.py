"""model.py - all the mathematics: a BERT of any depth and width, its two heads, and the soft committee's forward pass.

Reads top-down: configuration -> attention -> layer -> convolutional stem -> BERT -> heads -> committee.
Third of the six files. Where it stands: `data.py` makes batches of token ids; `pretrain.py` trains `MaskedLM`, `finetune.py` trains
`Classifier`, `committee.py` lets several classifiers vote. This file imports nothing of the project, and is
the only one that is not run. To see it at work: python pretrain.py --show "Paris is the [MASK] of France." runs/pretrain/RUN

References
1) BERT: Devlin et al., https://arxiv.org/abs/1810.04805 and github google-research/bert, modeling.py
2) Tiny language models: Gross et al., https://arxiv.org/abs/2507.14871 (one-layer variants, convolutional stem, committee)
3) Layer normalisation before or after each block: Xiong et al., https://arxiv.org/abs/2002.04745
4) Convolutions over a few tokens beside attention: So et al. (Primer), https://arxiv.org/abs/2109.08668

Shapes, throughout: B batch, T tokens, C width, H heads, D head width (C = H * D), M masked positions, V vocabulary,
K committee members, N channels of the convolutional stem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# cuDNN's attention, which PyTorch prefers on new GPUs, rounds the share of weights to drop to sixteenths (some versions), and prepares
# for every new shape anew
torch.backends.cuda.enable_cudnn_sdp(False)

PAD = 0  # the ids that the mathematics needs, fixed by tokenizer.py: [PAD];
HEAD, TAIL = 4, 3  # [MASK] and [SEP], which stand on both sides of a marked head and tail entity
POOLINGS = ("cls", "mean", "entities")


# --------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class BertConfig:
    """The architecture as data; saved with every checkpoint. The defaults are the paper's BERT-6."""

    vocab_size: int = 30_522
    layers: int = 6
    width: int = 768  # C; the feed-forward part is 4 C wide
    heads: int = 12
    max_length: int = 128  # rows of the position table
    dropout: float = 0.1  # on embeddings, block outputs and the classifier's input
    attention_dropout: float = 0.1  # on attention weights; authors' value; quick has none
    norm: str = "post"  # "post": BERT. "pre": norm inside the residual branch, and once at the end (MegatronBert)
    norm_eps: float = 1e-12
    init_std: float = 0.02
    local_start: float = 0.0  # > 0: heads begin by looking at neighbours, this sharply (see look_at_neighbours)
    short_conv: bool = False  # True: attention and feed-forward part read each token with a share of its neighbours (with_neighbours)
    pooling: str = "cls"  # what the classifier reads (see pool)
    conv_channels: int = 0  # N; with conv_kernels, a convolutional stem before the layers
    conv_kernels: tuple[int, ...] = ()
    leaky_stem: bool = False  # True: the authors' stem, through which padding leaks (for comparison only)
    frozen_row: int = -1  # >= 0: this token's embedding starts at 0 and its look-ups get no gradient (authors' fault)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads: choose --heads to divide it")
        if self.norm not in ("pre", "post") or self.pooling not in POOLINGS:
            raise ValueError(f"norm must be pre or post, pooling one of {', '.join(POOLINGS)}; got {self.norm!r}, {self.pooling!r}")
        object.__setattr__(self, "conv_kernels", tuple(self.conv_kernels))  # a list, when read back from JSON

    @property
    def pooled_width(self) -> int:
        """Numbers that the classifier reads of a text."""
        return self.width * (2 if self.pooling == "entities" else 1)


# name -> (layers, width relative to --width, channels of the stem, its kernels); paper, table of BERT-1 variants
MODELS: dict[str, tuple[int, float, int, tuple[int, ...]]] = {
    "bert-6": (6, 1, 0, ()),
    "bert-1": (1, 1, 0, ()),
    "bert-1-wide": (1, 2, 0, ()),  # 24 heads, at the paper's width
    "bert-1-conv2": (1, 1, 64, (3, 3)),
    "bert-1-conv2-narrow": (1, 2 / 3, 64, (3, 3)),  # 8 heads
    "bert-1-conv3": (1, 1, 32, (3, 3, 3)),
    "bert-1-conv2-k16": (1, 1, 64, (16, 3)),
}


def named_config(name: str, width: int = 768, heads: int = 0, **settings) -> BertConfig:
    """The configuration of a named model at a base width.

    width: a multiple of 64. heads: how many at that width (0: heads 64 wide); variants keep the width of a head
    where it fits. settings: further fields of BertConfig. Raises ValueError for an unknown name or width.
    """
    if name not in MODELS:
        raise ValueError(f"no model named {name!r}; there are {', '.join(MODELS)}")
    if width <= 0 or width % 64:
        raise ValueError(f"width {width} is not a positive multiple of 64")
    layers, relative_width, channels, kernels = MODELS[name]
    own_width = max(64, round(width * relative_width / 64) * 64)
    own_heads = own_width // 64
    if heads:
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads: choose --heads to divide it")
        head_width = width // heads
        own_heads = own_width // head_width if own_width % head_width == 0 else 1
    return BertConfig(layers=layers, width=own_width, heads=own_heads, conv_channels=channels, conv_kernels=kernels,
                      **settings)


# ------------------------------------------------------------------------------------------------- attention
def dropout(x: Tensor, p: float) -> Tensor:
    """x with a share p of its numbers set to 0, and the rest scaled by 1 / (1 - p): dropout as in training.

    On a CPU, where PyTorch draws a random number for each on one core, four are decided by one draw of 64 bits, and compared in place,
    since making truth values of numbers, and numbers of truth values, takes as long as the draw: a sixth of the time.
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = bits[: x.numel()].view(x.shape).ge_(round(p * 2**16) - 2**15)  # a whole number in -2^15 .. 2^15 - 1 becomes 0 or 1
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Who listens to whom: (B, H, T, T), row = who asks, column = who answers; each row sums to 1. Arguments as below."""
    # Exercise: let a token listen only to itself and to those before it, as a GPT does (with Attention.fused = False). Does the loss rise?
    B, H, T, D = q.shape
    silence = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)  # padding answers nobody; [CLS] is always there
    silence = silence.expand(B, H, 1, T).reshape(B * H, 1, T)
    q, k = q.reshape(B * H, T, D), k.reshape(B * H, T, D)
    scores = torch.baddbmm(silence, q, k.transpose(1, 2), alpha=1 / math.sqrt(D))  # q k^T / sqrt(D), in one pass with the padding's -inf
    return scores.softmax(dim=-1).view(B, H, T, T)


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float = 0.0) -> Tensor:
    """Scaled dot-product attention, written out. q, k, v: (B, H, T, D); mask: (B, 1, 1, T), True at real tokens; p: share of
    the attention weights to drop."""
    return dropout(attention_weights(q, k, mask), p) @ v  # (B, H, T, D)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for query, key and value."""

    # None: PyTorch's fused kernel, but on a CPU attention_by_hand, which takes a quarter of the time there (bf16, 128 tokens, forward
    # and backward). True, False: one of the two, for the whole class. Both compute the same function.
    fused: bool | None = None

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def project(self, x: Tensor) -> Tensor:
        """x: (B, T, C) -> query, key and value (3, B, H, T, D)."""
        B, T, C = x.shape
        return self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.project(x)  # each (B, H, T, D)
        p = self.dropout if self.training else 0.0
        if x.device.type != "cpu" if self.fused is None else self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        else:
            y = attention_by_hand(q, k, v, mask, p)
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # (B, H, T, D) -> (B, T, C)


# ----------------------------------------------------------------------------------------------------- layer
def with_neighbours(x: Tensor, taps: Tensor, real: Tensor) -> Tensor:
    """Each token with a share of the one before it and of the one behind, channel by channel: a depthwise convolution over three tokens.

    x: (..., B, T, C); taps: (2, ..., C), the shares; real: (B, T), True at real tokens: padding is 0, as what lies outside the text is.
    (Primer, reference 4, has them behind the query, key and value projections.)
    """
    x = x * real[:, :, None]
    before, behind = taps.to(x.dtype)
    return x + F.pad(x, (0, 0, 1, -1)) * before + F.pad(x, (0, 0, -1, 1)) * behind  # shifted by one token to either side


class ShortConv(nn.Module):
    """with_neighbours, with learnt shares; they begin at 0, where it changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # before, behind; broadcast over B and T. Four axes, so that Muon, which takes what has two, leaves them to AdamW
        self.taps = nn.Parameter(torch.zeros(2, 1, 1, width))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        return with_neighbours(x, self.taps, real)


class Layer(nn.Module):
    """One encoder layer: attention, then a feed-forward part, each with a residual connection and a LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        C = config.width
        self.pre_norm, self.dropout = config.norm == "pre", config.dropout
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(C, eps=config.norm_eps)
        self.mlp_in = nn.Linear(C, 4 * C)
        self.mlp_out = nn.Linear(4 * C, C)
        self.mlp_norm = nn.LayerNorm(C, eps=config.norm_eps)
        self.attention_near, self.mlp_near = (ShortConv(C) if config.short_conv else None for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.attend(self.attention_norm(x), mask)
            return x + self.feed_forward(self.mlp_norm(x), mask)
        x = self.attention_norm(x + self.attend(x, mask))
        return self.mlp_norm(x + self.feed_forward(x, mask))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.attention_near is not None:
            x = self.attention_near(x, mask[:, 0, 0])
        return self.drop(self.attention(x, mask))

    def feed_forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.mlp_near is not None:
            x = self.mlp_near(x, mask[:, 0, 0])
        return self.drop(self.mlp_out(F.gelu(self.mlp_in(x))))

    def drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout) if self.training else x


# ---------------------------------------------------------------------------------------- convolutional stem
class ConvStem(nn.Module):
    """The paper's convolutional stem: the (T, C) plane of a text as a one-channel image.

    [Conv2d "same" -> BatchNorm -> GELU] for each kernel, then 1x1 to one channel -> BatchNorm -> GELU; no residual.
    Unlike the authors' stem (config.leaky_stem), padding is zero before every convolution and absent from the
    statistics of the normalisation, so a text gets the same result alone and in a padded batch.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        channels = [1] + [config.conv_channels] * len(config.conv_kernels) + [1]
        kernels = (*config.conv_kernels, 1)
        self.leaky = config.leaky_stem
        self.convs = nn.ModuleList(nn.Conv2d(n, m, k, padding="same") for n, m, k in zip(channels, channels[1:], kernels))
        self.norms = nn.ModuleList(nn.BatchNorm1d(m) for m in channels[1:])

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x: (B, T, C); real: (B, T), True at real tokens -> (B, T, C)."""
        B, T, C = x.shape
        if self.leaky:
            real = torch.ones_like(real)
        kept = real.flatten().nonzero().squeeze(1)  # (R,), where the real tokens are among the B T
        # (B, N, T, C), here with N 1; the N channels of a point side by side in memory: any other order PyTorch copies to and fro
        image = (x * real[:, :, None])[..., None].permute(0, 3, 1, 2)
        for conv, norm in zip(self.convs, self.norms):
            image = conv(image)
            N = image.size(1)
            rows = image.permute(0, 2, 3, 1).reshape(B * T, C * N)
            points = rows.index_select(0, kept).view(len(kept) * C, N)  # of the real tokens alone, for the statistics
            points = F.gelu(norm(points)).to(rows.dtype)
            rows = torch.zeros_like(rows).index_put((kept,), points.view(len(kept), C * N))  # back among zeros
            image = rows.view(B, T, C, N).permute(0, 3, 1, 2)
        return image[:, 0]


# ------------------------------------------------------------------------------------------------------ BERT
def as_products(x: Tensor) -> Tensor:
    """x in the type of matrix products, where autocast is on and x on a CPU: what is added and normalised between the layers takes
    half the memory then, and no product's input needs a cast. (On a GPU, autocast keeps LayerNorm in fp32.)"""
    return x.to(torch.get_autocast_dtype("cpu")) if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") else x


class Bert(nn.Module):
    """Token ids -> hidden states. BERT's token-type table is left out: with one segment it is a constant,
    and part of the position table."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        C = config.width
        self.token = nn.Embedding(config.vocab_size, C, padding_idx=config.frozen_row if config.frozen_row >= 0 else None)
        self.position = nn.Embedding(config.max_length, C)
        if config.norm == "post":
            self.embedding_norm = nn.LayerNorm(C, eps=config.norm_eps)
        self.stem = ConvStem(config) if config.conv_kernels else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        if config.norm == "pre":
            self.final_norm = nn.LayerNorm(C, eps=config.norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, T), T <= max_length, PAD at the end of shorter texts -> hidden states (B, T, C)."""
        real = input_ids != PAD  # (B, T)
        mask = real[:, None, None, :]  # (B, 1, 1, T), for every head and every asking token
        x = self.token(input_ids) + self.position.weight[: input_ids.size(1)]
        if self.config.norm == "post":
            x = self.embedding_norm(x)
        x = as_products(x)
        if self.training:
            x = dropout(x, self.config.dropout)
        if self.stem is not None:
            x = self.stem(x, real)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x) if self.config.norm == "pre" else x


def initialise(module: MaskedLM | Classifier, config: BertConfig) -> None:
    """BERT's start: weights N(0, std), biases 0, norms 1 and 0. A stem's convolutions keep PyTorch's own, as the authors' do."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, 0.0, config.init_std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            nn.init.zeros_(part.weight[part.padding_idx])
    if config.local_start:
        look_at_neighbours(module.bert, config.local_start)


@torch.no_grad()
def look_at_neighbours(bert: Bert, sharpness: float) -> None:
    """A start from which the heads attend to the tokens before and behind, one place away, then two, and so on.

    The position table becomes random Fourier features, cos(w t) and sin(w t) with w uniform in (0, pi): position t and
    position j then have the dot product C/2 sinc(t - j), and a rotation of each (cos, sin) pair shifts t by an offset.
    So in every layer the key projection of a head passes some pairs through, and its query projection rotates them by
    the head's offset -1, +1, -2, +2, ... Weights of an ordinary BERT: only their start differs from N(0, std).
    """
    C, H = bert.config.width, bert.config.heads
    frequency = torch.rand(C // 2) * math.pi
    angle = torch.arange(bert.config.max_length)[:, None] * frequency  # (positions, C/2)
    bert.position.weight.copy_(torch.cat([angle.cos(), angle.sin()], 1) * 0.1 * math.sqrt(2))
    D = C // H
    for layer in bert.layers:
        assert isinstance(layer, Layer)
        query, key, _ = layer.attention.qkv.weight.view(3, H, D, C)  # views: (H, D, C)
        for h in range(H // 2):
            offset = (h // 2 + 1) * (1 if h % 2 else -1)
            pairs = torch.arange(h * (D // 2), (h + 1) * (D // 2))  # the frequencies this head works with
            rows, turn = torch.arange(D // 2), frequency[pairs] * offset
            key[h, rows, pairs] += sharpness
            key[h, rows + D // 2, pairs + C // 2] += sharpness
            query[h, rows, pairs] += turn.cos()
            query[h, rows, pairs + C // 2] -= turn.sin()
            query[h, rows + D // 2, pairs] += turn.sin()
            query[h, rows + D // 2, pairs + C // 2] += turn.cos()


# ----------------------------------------------------------------------------------------------------- heads
class MaskedLM(nn.Module):
    """BERT with the masked-language-model head, which works on the masked positions only: the other 85 % of the
    logits would be thrown away, and at a small width the head is most of the work. Output and input embedding are tied."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialise(self, config)

    def forward(self, input_ids: Tensor, positions: Tensor, pieces: Tensor | None = None) -> Tensor:
        """input_ids: (B, T); positions: (M,) indices into the flattened batch -> logits (M, V), or of some pieces (K,) alone, (M, K)."""
        hidden = self.bert(input_ids).flatten(0, 1).index_select(0, positions)  # (M, C)
        hidden = self.norm(F.gelu(self.dense(hidden)))
        if pieces is None:
            return F.linear(hidden, self.bert.token.weight, self.bias)
        return F.linear(hidden, self.bert.token.weight.index_select(0, pieces), self.bias.index_select(0, pieces))


def pool(hidden: Tensor, input_ids: Tensor, pooling: str) -> Tensor:
    """hidden: (..., B, T, C); input_ids: (B, T) -> what the classifier reads of each text, (..., B, C).

    "cls": the first token. "mean": of the real tokens. "entities": the mean over the first head entity beside the mean over the first
    tail entity, (..., B, 2 C), each with its opening mark (after R-BERT, Wu and He, https://arxiv.org/abs/1905.08284, which reads [CLS]
    too). An entity whose closing mark is cut off reaches to the end; where no head is left that is 0, where no tail is, the last [SEP].
    """
    if pooling == "cls":
        return hidden[..., 0, :]
    real = input_ids != PAD
    if pooling == "mean":
        return masked_mean(hidden, real)
    return torch.cat([masked_mean(hidden, real & ((input_ids == mark).cumsum(1) == 1)) for mark in (HEAD, TAIL)], -1)


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of hidden (..., B, T, C) over the positions where mask (B, T) is true: (..., B, C); 0 where there are none."""
    return (hidden * mask[:, :, None]).sum(-2) / mask.sum(1, keepdim=True).clamp(min=1)


class Classifier(nn.Module):
    """BERT with a classifier on what pool() makes of its output, squashed by a linear map and tanh."""

    def __init__(self, config: BertConfig, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.bert = Bert(config)
        self.pooler = nn.Linear(config.pooled_width, config.width)
        self.output = nn.Linear(config.width, classes)
        initialise(self, config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, T) -> logits (B, classes)."""
        pooled = torch.tanh(self.pooler(pool(self.bert(input_ids), input_ids, self.config.pooling)))
        return self.output(dropout(pooled, self.config.dropout) if self.training else pooled)


# ------------------------------------------------------------------------------------------------- committee
class Committee(nn.Module):
    """K classifiers of one shape, evaluated in one batched pass; for inference.

    Their weights are stacked along a first axis, so every projection is one batched matrix product, and the
    members are folded into the batch around attention. Equal to calling them one after another (a test sees to it).
    """

    def __init__(self, members: list[Classifier]) -> None:
        super().__init__()
        if len({(m.config, m.classes) for m in members}) != 1:
            raise ValueError("a batched committee needs members of one shape: group others by their configuration")
        self.config = members[0].config
        states = [m.state_dict() for m in members]
        for name in states[0]:  # a buffer's name may not hold a dot
            self.register_buffer(name.replace(".", "/"), torch.stack([s[name] for s in states]))

    def get(self, name: str) -> Tensor:
        return self._buffers[name.replace(".", "/")]  # type: ignore[return-value]

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x: (K, rows, in) -> (K, rows, out)."""
        return torch.baddbmm(self.get(name + ".bias")[:, None], x, self.get(name + ".weight").transpose(1, 2))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """x: (K, rows, C); one LayerNorm for each member."""
        x = F.layer_norm(x, x.shape[-1:], eps=self.config.norm_eps)
        weight, bias = (self.get(name + part)[:, None].to(x.dtype) for part in (".weight", ".bias"))
        return torch.addcmul(bias, x, weight)

    def near(self, x: Tensor, real: Tensor, name: str) -> Tensor:
        """x: (K, B * T, C) -> the same, each token with a share of its neighbours where the members have short convolutions."""
        if not self.config.short_conv:
            return x
        return with_neighbours(x.view(len(x), *real.shape, -1), self.get(name).transpose(0, 1), real).view(x.shape)

    def attend(self, x: Tensor, real: Tensor, name: str) -> Tensor:
        """x: (K, B * T, C) -> (K, B * T, C); to attention, member and text are one axis of K * B."""
        (B, T), K, H = real.shape, x.size(0), self.config.heads
        q, k, v = self.linear(x, name + ".qkv").view(K * B, T, 3, H, -1).permute(2, 0, 3, 1, 4)  # (K * B, H, T, D)
        mask = real.repeat(K, 1)[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.linear(y.transpose(1, 2).reshape(x.shape), name + ".out")

    def stem(self, x: Tensor, real: Tensor) -> Tensor:
        """x: (K, B * T, C) -> the same; the members' images are groups of channels of one grouped convolution."""
        (B, T), K, C = real.shape, x.size(0), x.size(-1)
        keep = True if self.config.leaky_stem else real[:, None, :, None]
        image = x.view(K, B, T, C).transpose(0, 1) * keep  # (B, K, T, C)
        for i in range(len(self.config.conv_kernels) + 1):
            weight, bias = (self.get(f"bert.stem.convs.{i}.{part}").flatten(0, 1) for part in ("weight", "bias"))
            mean, var, scale, shift = (self.get(f"bert.stem.norms.{i}.{part}").flatten()
                                       for part in ("running_mean", "running_var", "weight", "bias"))
            image = F.batch_norm(F.conv2d(image, weight, bias, padding="same", groups=K), mean, var, scale, shift)
            image = F.gelu(image) * keep
        return image.transpose(0, 1).reshape(x.shape)

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, T) -> logits of every member (K, B, classes)."""
        (B, T), C, pre = input_ids.shape, self.config.width, self.config.norm == "pre"
        real = input_ids != PAD
        x = self.get("bert.token.weight")[:, input_ids] + self.get("bert.position.weight")[:, None, :T]  # (K, B, T, C)
        x = x.view(-1, B * T, C)
        if not pre:
            x = self.norm(x, "bert.embedding_norm")
        x = as_products(x)
        if self.config.conv_kernels:
            x = self.stem(x, real)
        for i in range(self.config.layers):
            name = f"bert.layers.{i}"
            y = self.near(self.norm(x, name + ".attention_norm") if pre else x, real, name + ".attention_near.taps")
            y = self.attend(y, real, name + ".attention")
            x = x + y if pre else self.norm(x + y, name + ".attention_norm")
            y = self.near(self.norm(x, name + ".mlp_norm") if pre else x, real, name + ".mlp_near.taps")
            y = self.linear(F.gelu(self.linear(y, name + ".mlp_in")), name + ".mlp_out")
            x = x + y if pre else self.norm(x + y, name + ".mlp_norm")
        if pre:
            x = self.norm(x, "bert.final_norm")
        pooled = pool(x.view(-1, B, T, C), input_ids, self.config.pooling)
        return self.linear(torch.tanh(self.linear(pooled, "pooler")), "output")


# ------------------------------------------------------------------------------------------------ its price
def count_parameters(module: nn.Module) -> int:
    """Trained numbers; tied embeddings count once."""
    return sum(p.numel() for p in module.parameters())


def count_operations(config: BertConfig, tokens: int, classes: int = 0, masked: int = 0) -> int:
    """Floating-point operations (a multiplication and an addition are two) of one forward pass over a text.

    tokens: its length; classes: of the classifier (0: none); masked: positions the MLM head works on. Matrix products and
    the stem's convolutions only. A training step costs three times as much.
    """
    C, T = config.width, tokens
    layer = 2 * T * 12 * C * C + 4 * T * T * C  # four projections' worth, eight for the feed-forward; scores and mix
    channels = [1] + [config.conv_channels] * len(config.conv_kernels) + [1]
    stem = sum(2 * T * C * n * m * k * k for n, m, k in zip(channels, channels[1:], (*config.conv_kernels, 1)))
    head = 2 * masked * C * (C + config.vocab_size) + (2 * C * (config.pooled_width + classes) if classes else 0)
    return config.layers * layer + (stem if config.conv_kernels else 0) + head

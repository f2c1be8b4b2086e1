"""model.py - BERT, its two heads, and several classifiers as one model.

Third of the six files. Its classes import nothing from the project. Read it from top to bottom:
configuration -> attention -> layer -> convolutional stem -> BERT -> heads -> committee.

    python model.py                                 each stage of BERT-1: shape and parameters
    python model.py --model bert-6 --width 128

References
1) BERT: Devlin et al., https://arxiv.org/abs/1810.04805; github google-research/bert, modeling.py
2) Tiny language models: Gross et al., https://arxiv.org/abs/2507.14871 (one-layer models, the
   convolutional stem, the soft committee)
3) Where to put the LayerNorm: Xiong et al., https://arxiv.org/abs/2002.04745
4) Reading the marked entities: R-BERT, Wu and He, https://arxiv.org/abs/1905.08284

Shapes: B texts, T tokens, C width, H heads, D width of a head (C = H * D), M masked positions,
V vocabulary, K members of a committee, N channels of the stem. "..." stands for B, or for K, B.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, SEP, MASK = 0, 3, 4  # ids of special tokens; tokenizer.py defines them
# In FewRel a text has two marked entities, called head and tail (not the heads of attention). The
# marks are tokens that pre-training has trained: [MASK] before and after the head, [SEP] before and
# after the tail. Texts to classify are never masked, so nothing is mixed up.
HEAD_MARK, TAIL_MARK = MASK, SEP
NORMS = ("post", "pre")
POOLINGS = ("cls", "mean", "entities")
INIT_STD = 0.02  # standard deviation of the initial weights

# Some versions of cuDNN's attention round the dropout rate to a multiple of 1/16. So this attention
# is switched off.
torch.backends.cuda.enable_cudnn_sdp(False)


# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class BertConfig:
    """The architecture. The defaults are the paper's BERT-6."""

    vocab_size: int = 30_522
    layers: int = 6
    width: int = 768  # C
    heads: int = 12
    max_length: int = 128  # the longest text, in tokens
    dropout: float = 0.1
    norm: str = "post"  # LayerNorm after each block (BERT), or "pre": before it
    norm_eps: float = 1e-12
    pooling: str = "cls"  # what the classifier reads: see pool()
    conv_channels: int = 0  # N, of the convolutional stem
    conv_kernels: tuple[int, ...] = ()  # its kernel sizes; none: no stem

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.norm not in NORMS or self.pooling not in POOLINGS:
            raise ValueError(f"norm {self.norm!r} is not one of {NORMS}, or pooling "
                             f"{self.pooling!r} not one of {POOLINGS}")
        object.__setattr__(self, "conv_kernels", tuple(self.conv_kernels))  # JSON makes a list


# The models of the paper.
# name -> layers, width relative to the base width, channels of the stem, its kernel sizes
MODELS: dict[str, tuple[int, float, int, tuple[int, ...]]] = {
    "bert-6": (6, 1, 0, ()),
    "bert-1": (1, 1, 0, ()),
    "bert-1-wide": (1, 2, 0, ()),
    "bert-1-conv2": (1, 1, 64, (3, 3)),
    "bert-1-conv2-narrow": (1, 2 / 3, 64, (3, 3)),
    "bert-1-conv3": (1, 1, 32, (3, 3, 3)),
    "bert-1-conv2-k16": (1, 1, 64, (16, 3)),
}


def named_config(name: str, width: int = 768, heads: int = 12, **settings) -> BertConfig:
    """The configuration of a model in MODELS.

    width, heads: those of the base model. A wider or narrower model has as many more or fewer
    heads, so that a head keeps its width. The scaled width is rounded to a multiple of 64.
    settings: other fields of BertConfig. Raises ValueError if they do not fit.
    """
    layers, relative_width, channels, kernels = MODELS[name]
    if width < 64 or width % 64:
        raise ValueError(f"width {width} is not a multiple of 64")
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of {heads} heads")
    own_width = round(width * relative_width / 64) * 64
    own_heads = max(1, own_width // (width // heads))
    return BertConfig(layers=layers, width=own_width, heads=own_heads, conv_channels=channels,
                      conv_kernels=kernels, **settings)


# ---- attention -----------------------------------------------------------------------------------


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout, fast on a CPU: one 64-bit random number decides four elements.

    PyTorch draws one number for each element there, which takes six times as long.
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    numbers = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = numbers.view(torch.int16)[: x.numel()].view(x.shape)
    # Each int16 is uniform over -2**15 .. 2**15 - 1.
    keep = numbers.ge_(round(p * 2**16) - 2**15)  # in place: 1 with probability 1 - p, else 0
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """How much each token (row) attends to each token (column); a row sums to 1.

    q, k: (B, H, T, D); mask: (B, 1, 1, T), 0 at real tokens, -inf at padding -> (B, H, T, T).
    """
    # Exercise: let a token attend only to itself and to those before it, as a GPT does. Set
    # Attention.fused to False below, and train with --runs-dir runs/causal. How much does the
    # held-out loss rise?
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)
    return scores.add_(mask).softmax(dim=-1)  # exp(-inf) = 0: nobody attends to padding


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float = 0.0) -> Tensor:
    """Scaled dot-product attention, written out. p: the share of the weights to drop.

    q, k, v: (B, H, T, D); mask: (B, 1, 1, T) -> (B, H, T, D).
    """
    return dropout(attention_weights(q, k, mask), p) @ v


class Attention(nn.Module):
    """Multi-head self-attention. One projection makes query, key and value."""

    # True: PyTorch's fused kernel. False: attention_by_hand. Both compute the same function. None:
    # fused on a GPU, and by hand on a CPU, where training with the kernel takes four times as long.
    fused: bool | None = None

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def project(self, x: Tensor) -> Tensor:
        """x: (..., T, C) -> query, key and value: (3, B, H, T, D), or (3, K * B, H, T, D)."""
        T, C = x.shape[-2:]
        return self.qkv(x).view(-1, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (..., T, C); mask: (B, 1, 1, T), 0 or -inf -> (..., T, C)."""
        q, k, v = self.project(x)
        # The mask is the same for all members: (B, 1, 1, T) -> (K * B, 1, 1, T)
        mask = mask.expand(*x.shape[:-2], 1, 1, -1).flatten(0, -4)
        p = self.dropout if self.training else 0.0
        use_fused = self.fused if self.fused is not None else x.device.type != "cpu"
        if use_fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        else:
            y = attention_by_hand(q, k, v, mask, p)
        return self.out(y.transpose(1, 2).reshape(x.shape))  # heads side by side again


# ---- layer ---------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention, then a feed-forward part (mlp). Each has a residual connection and a LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        C = config.width
        self.pre_norm = config.norm == "pre"
        self.dropout = config.dropout
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(C, eps=config.norm_eps)
        self.mlp_in = nn.Linear(C, 4 * C)
        self.mlp_out = nn.Linear(4 * C, C)
        self.mlp_norm = nn.LayerNorm(C, eps=config.norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (..., T, C); mask: (B, 1, 1, T) -> (..., T, C)."""
        if self.pre_norm:
            x = x + self.drop(self.attention(self.attention_norm(x), mask))
            return x + self.drop(self.feed_forward(self.mlp_norm(x)))
        x = self.attention_norm(x + self.drop(self.attention(x, mask)))
        return self.mlp_norm(x + self.drop(self.feed_forward(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp_out(F.gelu(self.mlp_in(x)))

    def drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout) if self.training else x


# ---- convolutional stem --------------------------------------------------------------------------


class ConvStem(nn.Module):
    """The paper's convolutional stem, between the embeddings and the first layer.

    It treats the (T, C) matrix of a text as an image.

    Conv2d, BatchNorm and GELU for each kernel, then the same with a 1x1 kernel to one channel.
    Padding is 0 before each convolution and does not count in the BatchNorm's statistics, so a
    text gets the same result alone and in a batch. (In the authors' code padding leaks in.)
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        channels = [1] + [config.conv_channels] * len(config.conv_kernels) + [1]
        kernels = (*config.conv_kernels, 1)
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for ins, outs, kernel in zip(channels, channels[1:], kernels):
            self.convs.append(nn.Conv2d(ins, outs, kernel, padding="same"))
            self.norms.append(nn.BatchNorm1d(outs))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x: (B, T, C); real: (B, T), True at real tokens -> (B, T, C)."""
        B, T, C = x.shape
        tokens = real.flatten().nonzero().squeeze(1)  # (R,): places of the R real tokens in B * T
        # The N channels of a point lie side by side in memory, as (B, T, C, N). Otherwise PyTorch
        # copies the image before and after each convolution.
        image = (x * real[:, :, None])[..., None].permute(0, 3, 1, 2)  # (B, N, T, C) with N = 1
        for conv, norm in zip(self.convs, self.norms):
            image = conv(image)
            N = image.size(1)
            points = image.permute(0, 2, 3, 1).reshape(B * T, C * N)
            of_tokens = points.index_select(0, tokens).view(-1, N)  # (R * C, N): no padding
            of_tokens = F.gelu(norm(of_tokens)).to(points.dtype).view(-1, C * N)
            points = torch.zeros_like(points).index_put((tokens,), of_tokens)
            image = points.view(B, T, C, N).permute(0, 3, 1, 2)
        return image[:, 0]


# ---- BERT ----------------------------------------------------------------------------------------


class Bert(nn.Module):
    """Token ids -> hidden states.

    BERT's token-type table, which tells a first sentence from a second, is left out: here a text
    has one part, so it would add the same vector everywhere.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_length, config.width)
        if config.norm == "post":
            self.embedding_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.stem = ConvStem(config) if config.conv_kernels else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        if config.norm == "pre":
            self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, T), PAD behind shorter texts -> hidden states (..., T, C)."""
        real = input_ids != PAD  # (B, T)
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        # Exercise: leave out the positions, and train with --runs-dir runs/unordered. How much does
        # the held-out loss rise if the model cannot know the order of the tokens?
        # Exercise: add fixed sines and cosines in their place (Vaswani et al., 2017, section 3.5),
        # times 0.14, and train with --runs-dir runs/waves. Does a table that is learned do better?
        x = self.token(input_ids) + self.position(positions).unsqueeze(-3)  # (..., T, C)
        if self.config.norm == "post":
            x = self.embedding_norm(x)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))  # halves the memory traffic between layers
        mask = torch.zeros(real.shape, dtype=x.dtype, device=x.device).masked_fill(~real, -math.inf)
        mask = mask[:, None, None, :]  # (B, 1, 1, T): the same for every head and every row
        if self.training:
            x = dropout(x, self.config.dropout)
        if self.stem is not None:
            x = self.stem(x, real)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x) if self.config.norm == "pre" else x


def initialise(model: nn.Module) -> None:
    """BERT's initial values: weights with standard deviation INIT_STD, biases 0. Convolutions and
    LayerNorms keep PyTorch's initial values."""
    for part in model.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, 0.0, INIT_STD)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


# ---- heads ---------------------------------------------------------------------------------------


class MaskedLM(nn.Module):
    """BERT with the masked-language-model head. The output layer uses the
    weights of the token embedding (they are "tied").

    The head works on the masked positions alone. All other logits would be thrown away.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialise(self)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids: (B, T); positions: (M,), indices into the B * T tokens -> logits (M, V)."""
        hidden = self.bert(input_ids).flatten(0, 1).index_select(0, positions)  # (M, C)
        hidden = self.norm(F.gelu(self.dense(hidden)))
        return F.linear(hidden, self.bert.token.weight, self.bias)


def pool(hidden: Tensor, input_ids: Tensor, pooling: str) -> Tensor:
    """Make one vector of the hidden states of each text, for the classifier.

    hidden: (..., T, C); input_ids: (B, T) -> (..., C), or (..., 2 C) for "entities".
    "cls": the first token. "mean": the mean over the real tokens. "entities": the mean over the
    first head entity, then the mean over the first tail entity, each with its opening mark. If a
    text was cut off before its head, it has no head mark, and the first mean is 0. If it was cut
    off before its tail, its only [SEP] is the last token, and the second mean is that token.
    """
    if pooling == "cls":
        return hidden[..., 0, :]
    real = input_ids != PAD
    if pooling == "mean":
        return masked_mean(hidden, real)
    head = (input_ids == HEAD_MARK).cumsum(1) == 1  # from the first mark to before the second
    tail = (input_ids == TAIL_MARK).cumsum(1) == 1
    return torch.cat([masked_mean(hidden, head & real), masked_mean(hidden, tail & real)], dim=-1)


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of hidden (..., T, C) over the tokens where mask (B, T) is True: (..., C), or 0."""
    return (hidden * mask[:, :, None]).sum(-2) / mask.sum(1, keepdim=True).clamp(min=1)


class Classifier(nn.Module):
    """BERT with a classifier: pooling, linear layer, tanh, dropout, linear layer."""

    def __init__(self, config: BertConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        vectors = 2 if config.pooling == "entities" else 1  # that pool() puts side by side
        self.pooler = nn.Linear(vectors * config.width, config.width)
        self.output = nn.Linear(config.width, classes)
        initialise(self)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, T) -> logits (..., classes)."""
        pooled = pool(self.bert(input_ids), input_ids, self.config.pooling)
        pooled = torch.tanh(self.pooler(pooled))
        return self.output(dropout(pooled, self.config.dropout) if self.training else pooled)


# ---- committee -----------------------------------------------------------------------------------


def vote(logits: Tensor) -> Tensor:
    """The soft vote: the mean of the members' probabilities. (K, B, classes) -> (B, classes)."""
    # Exercise: let each member vote for one class, and give the same committee.py command again. It
    # trains nothing, prints a new table, and overwrites the old results.json. Is the vote worse?
    # Who wins if two members disagree?
    return logits.float().softmax(dim=-1).mean(dim=0)


class Committee(nn.Module):
    """Several classifiers as one model. Members of one shape are computed at once."""

    def __init__(self, members: Sequence[Classifier]) -> None:
        super().__init__()
        alike: dict[BertConfig, list[Classifier]] = {}
        for member in members:
            alike.setdefault(member.config, []).append(member)
        self.groups = nn.ModuleList()
        for config, group in alike.items():
            if config.conv_kernels:  # convolutions and BatchNorm have no stacked version
                self.groups.extend(group)
            else:
                self.groups.append(stack(group))

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, T) -> all members' logits (K, B, classes), those of one shape together."""
        logits = [group(input_ids) for group in self.groups]
        return torch.cat([x if x.dim() == 3 else x[None] for x in logits])


def stack(members: Sequence[Classifier]) -> Classifier:
    """One model that computes K members of one shape: (B, T) -> logits (K, B, classes).

    Each Linear, LayerNorm and Embedding is replaced by a stacked version, whose weights have a
    member axis in front. All other code is the same, since it leaves the axes before (T, C) alone.
    """
    stacked = copy.deepcopy(members[0])
    for name, part in members[0].named_modules():
        stacked_version = STACKED.get(type(part))
        if stacked_version:
            parent, _, child = name.rpartition(".")
            parts = [member.get_submodule(name) for member in members]
            setattr(stacked.get_submodule(parent), child, stacked_version(parts))
    return stacked


def stacked_parameter(parts: Sequence[nn.Module], name: str) -> nn.Parameter:
    return nn.Parameter(torch.stack([getattr(part, name).detach() for part in parts]))


class StackedLinear(nn.Module):
    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.weight = stacked_parameter(parts, "weight")  # (K, out, in)
        self.bias = stacked_parameter(parts, "bias")  # (K, out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (K, ..., in) -> (K, ..., out), as one batched matrix product."""
        y = torch.baddbmm(self.bias[:, None], x.flatten(1, -2), self.weight.transpose(1, 2))
        return y.view(*x.shape[:-1], -1)


class StackedLayerNorm(nn.Module):
    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        self.weight = stacked_parameter(parts, "weight")  # (K, C)
        self.bias = stacked_parameter(parts, "bias")
        self.eps = parts[0].eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (K, B, T, C) -> the same shape."""
        weight, bias = self.weight[:, None, None].to(x.dtype), self.bias[:, None, None].to(x.dtype)
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:], eps=self.eps), weight)


class StackedEmbedding(nn.Module):
    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.weight = stacked_parameter(parts, "weight")  # (K, rows, C)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...) -> (K, ..., C)."""
        return self.weight[:, ids]


STACKED: dict[type, Callable[[Sequence[nn.Module]], nn.Module]] = {
    nn.Linear: StackedLinear, nn.LayerNorm: StackedLayerNorm, nn.Embedding: StackedEmbedding}


# ---- what each stage returns ---------------------------------------------------------------------


def count_parameters(model: nn.Module) -> int:
    """The number of parameters; tied embeddings count once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def print_stages(model: MaskedLM, input_ids: Tensor, positions: Tensor) -> None:
    """Print what each stage of a forward pass returns, and its number of parameters."""
    print(f"{'stage':32}{'module':12}{'shape':18}parameters")
    print(f"{'input_ids':32}{'':12}{tuple(input_ids.shape)}")

    names = {module: name for name, module in model.named_modules() if name}

    def report(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        print(f"{names[module]:32}{type(module).__name__:12}{str(tuple(output.shape)):18}"
              f"{count_parameters(module):,}")

    for module in names:
        module.register_forward_hook(report)
    logits = model(input_ids, positions)
    print(f"{'logits':32}{'':12}{str(tuple(logits.shape)):18}{model.bias.numel():,} "
          "(a bias; the weights are bert.token's)")
    print(f"{count_parameters(model):,} parameters in all")


def main() -> None:
    from tokenizer import InputError, Parser  # here: the model itself needs nothing of the project

    parser = Parser(__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), default="bert-1", help="which model")
    parser.add_argument("--width", type=int, default=768, help="base width (default %(default)s)")
    args = parser.parse_args()
    try:
        config = named_config(args.model, args.width, max(1, args.width // 64))
    except ValueError as error:
        raise InputError(f"--width: {error}") from None
    print(f"{args.model}: {config}")
    print("one text of 128 tokens; the head predicts 20 of them")
    model = MaskedLM(config).eval()
    print_stages(model, torch.full((1, config.max_length), MASK), torch.arange(20))


if __name__ == "__main__":
    from tokenizer import run_script

    run_script(main)

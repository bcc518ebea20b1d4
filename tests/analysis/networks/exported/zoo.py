"""Networks of every kind, with inputs: of timm, torchvision, transformers, built in, and written by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

N_CLASSES = 7
EXAMPLES, SAMPLES = 2, 3


@dataclass(frozen=True)
class Case:
    """A network, what it was exported with, and a batch of another size, both as the model is called."""

    model: nn.Module
    example: Any
    batch: Any


def case(name: str) -> Case:
    """Return a network of the zoo, in evaluation mode, with weights that are not zero."""
    torch.manual_seed(0)
    made = ZOO[name]()
    made.model.eval().requires_grad_(False)
    chance = torch.Generator().manual_seed(1)
    for buffer_name, buffer in made.model.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=chance)
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=chance)
    for parameter in made.model.parameters():
        if not parameter.any():
            parameter.normal_(0, 0.05, generator=chance)
    return made


def _images(model: nn.Module, size: int, channels: int = 3, name: str | None = None) -> Case:
    few, more = (torch.randn(n, channels, size, size) for n in (EXAMPLES, SAMPLES))
    return Case(model, few, more) if name is None else Case(model, {name: few}, {name: more})


def _timm(name: str, size: int) -> Case:
    import timm

    return _images(timm.create_model(name, pretrained=False, num_classes=N_CLASSES), size)


def _torchvision(name: str, size: int = 64) -> Case:
    from torchvision.models import get_model

    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return _images(get_model(name, weights=None, num_classes=N_CLASSES, **more), size)


def _texts(kind: str, task: str, **config: Any) -> Case:
    import transformers

    values = _TEXT | config | {"num_labels": N_CLASSES, "use_cache": False}
    parsed = getattr(transformers, f"{kind}Config")(**values)
    return Case(getattr(transformers, f"{kind}{task}")(parsed), _tokens(EXAMPLES, 9), _tokens(SAMPLES, 6))


def _tokens(n: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(n, length, dtype=torch.int64)
    mask[0, length - 2 :] = 0
    return {"input_ids": torch.randint(5, 50, (n, length)), "attention_mask": mask}


def _pictures(kind: str, size: int = 32, **config: Any) -> Case:
    import transformers

    parsed = getattr(transformers, f"{kind}Config")(**config, num_labels=N_CLASSES)
    return _images(getattr(transformers, f"{kind}ForImageClassification")(parsed), size, name="pixel_values")


def _builtin(name: str, shape: tuple[int, ...], **args: Any) -> Case:
    from analysis.networks.loading import build

    model = build({"family": "builtin", "name": name, "args": args}, device="cpu")
    return Case(model, torch.randn(EXAMPLES, *shape), torch.randn(SAMPLES, *shape))


class Residual(nn.Module):
    """Two branches that meet, with an addition in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.stem(x)))
        x += functional.relu(self.block(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Attention written out, over positions of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 48)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 4, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).reshape(n, length, width)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class Recurrent(nn.Module):
    """A GRU or an LSTM of two layers in both directions, of which the last step counts."""

    def __init__(self, cells: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.cells = cells(6, 8, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.out = nn.Linear(16, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.cells(x)[0][:, -1])
        return logits


class Branches(nn.Module):
    """Two positional inputs, a choice by its own settings, and a dictionary of outputs."""

    def __init__(self, *, deep: bool) -> None:
        super().__init__()
        self.deep = deep
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.a(x) + self.b(y))
        if self.deep:
            h = torch.cat([h[:, :4].exp(), self.c(h)[:, 4:]], 1)
        return {"norm": x.norm(dim=1), "logits": self.out(h)}


class Normalised(nn.Module):
    """Weights that are computed: a direction and lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, N_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(functional.adaptive_avg_pool2d(functional.gelu(self.first(x)), 1).flatten(1))
        return logits


class ChannelsLast(nn.Module):
    """Tensors in another order in memory, and depthwise and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.norm = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.GroupNorm(2, 4)
        self.head = nn.Conv2d(4, N_CLASSES, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(functional.silu(self.stem(x.contiguous(memory_format=torch.channels_last))))
        x = functional.max_pool2d(self.norm(self.up(x)), 2)
        logits: Tensor = self.head(functional.adaptive_avg_pool2d(x, 1)).flatten(1)
        return logits


class Einsum(nn.Module):
    """Products by einsum, a weight that is a plain parameter, and a head that is one too."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.w = nn.Parameter(torch.randn(6, 8) / 3), nn.Parameter(torch.randn(8, N_CLASSES) / 3)
        self.scale: Tensor
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("btd,de->bte", x, self.mix) * self.scale
        h = torch.where(h > 0, h, h * 0.1).amax(1)
        return h @ self.w


class Named(nn.Module):
    """A dictionary of inputs: whole numbers and a table of them, beside a list of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.numbers = nn.Embedding(20, 8, padding_idx=0), nn.Linear(3, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, N_CLASSES)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        shown = (batch["words"] != 0).unsqueeze(-1)
        h = (self.words(batch["words"]) * shown).sum(1) / shown.sum(1).clamp(min=1) + self.numbers(batch["numbers"])
        for layer in self.layers:
            h = h + functional.relu6(layer(h))
        return self.out(h), h


class Encoder(nn.Module):
    """torch's own encoder, on tokens whose number is arithmetic of the input's."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, dropout=0.1)
        self.embed = nn.Embedding(30, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, N_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        n, length = ids.shape
        places = torch.arange(length, device=ids.device).expand(n, length)
        h = self.embed(ids) + torch.sin(places[..., None] / torch.arange(1, 17, device=ids.device))
        logits: Tensor = self.head(self.encoder(functional.pad(h, (0, 0, 0, max(length // 2, 1))))[:, :length].mean(1))
        return logits


class Spectral(nn.Module):
    """Fourier transforms, and statistics of the batch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(8, 8), nn.InstanceNorm1d(5)
        self.head = nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + torch.fft.fft2(self.inner(x)).real)
        logits: Tensor = self.head(x.std(1))
        return logits


def _of(model: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Case:
    few, more = (tuple(torch.randn(n, *shape) for shape in shapes) for n in (EXAMPLES, SAMPLES))
    return Case(model(), few, more)


def _named_inputs(n: int) -> tuple[dict[str, Tensor]]:
    return ({"words": torch.randint(0, 20, (n, 5)), "numbers": torch.randn(n, 3)},)


_TEXT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}
_CLASSES, _TOKENS = "ForSequenceClassification", "ForCausalLM"

HAND_WRITTEN: dict[str, Callable[[], Case]] = {
    "residual": partial(_of, Residual, (3, 16, 16)),
    "attention": partial(_of, Attention, (3, 16, 16)),
    "gru": partial(_of, partial(Recurrent, nn.GRU), (5, 6)),
    "lstm": partial(_of, partial(Recurrent, nn.LSTM), (5, 6)),
    "branches": partial(_of, partial(Branches, deep=False), (4,), (3,)),
    "deep branches": partial(_of, partial(Branches, deep=True), (4,), (3,)),
    "weight_norm": partial(_of, Normalised, (3, 10, 10)),
    "channels_last": partial(_of, ChannelsLast, (3, 16, 16)),
    "einsum": partial(_of, Einsum, (5, 6)),
    "dictionary": lambda: Case(Named(), _named_inputs(EXAMPLES), _named_inputs(SAMPLES)),
    "encoder": lambda: Case(Encoder(), torch.randint(0, 30, (EXAMPLES, 6)), torch.randint(0, 30, (SAMPLES, 9))),
    "fourier": partial(_of, Spectral, (5, 8)),
}
_OF_TIMM = {
    "resnet18": 64, "mobilenetv3_small_100": 64, "convnext_atto": 64, "vit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224, "efficientnet_b0": 64, "mixer_s32_224": 224, "deit_tiny_patch16_224": 224,
    "regnetx_002": 64, "densenet121": 64, "ghostnet_050": 64, "mobileone_s0": 64, "levit_128s": 224,
    "maxvit_pico_rw_256": 256, "coatnet_pico_rw_224": 224, "beit_base_patch16_224": 224, "poolformer_s12": 224,
    "edgenext_xx_small": 64, "mobilevit_xxs": 64, "xcit_nano_12_p16_224": 224, "crossvit_tiny_240": 240,
    "cait_xxs24_224": 224, "gmlp_s16_224": 224, "resmlp_12_224": 224, "tf_efficientnet_b0": 64, "dla34": 64,
    "hrnet_w18_small": 64, "vgg11": 64, "res2net50_26w_4s": 64, "resnest14d": 64, "skresnet18": 64, "repvgg_a0": 64,
    "rexnet_100": 64, "selecsls42": 64, "inception_v3": 128, "xception41": 128, "nfnet_f0": 64, "eca_nfnet_l0": 64,
    "fastvit_t8": 64, "tiny_vit_5m_224": 224, "efficientformer_l1": 224, "pvt_v2_b0": 64, "twins_svt_small": 224,
    "volo_d1_224": 224, "visformer_tiny": 224, "hiera_tiny_224": 224, "davit_tiny": 224, "focalnet_tiny_srf": 224,
    "nest_tiny": 224, "eva02_tiny_patch14_224": 224,
}  # fmt: skip
_OF_TORCHVISION = {
    "alexnet": 224, "vgg11_bn": 64, "resnet18": 64, "squeezenet1_0": 64, "densenet121": 64, "googlenet": 64,
    "shufflenet_v2_x0_5": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "mnasnet0_5": 64, "efficientnet_b0": 64,
    "efficientnet_v2_s": 64, "regnet_y_400mf": 64, "vit_b_32": 224, "swin_t": 64, "swin_v2_t": 64, "convnext_tiny": 64,
    "maxvit_t": 224, "resnext50_32x4d": 64, "wide_resnet50_2": 64, "inception_v3": 96,
}  # fmt: skip
ZOO: dict[str, Callable[[], Case]] = {
    **HAND_WRITTEN,
    **{f"timm {name}": partial(_timm, name, size) for name, size in _OF_TIMM.items()},
    **{f"torchvision {name}": partial(_torchvision, name, size) for name, size in _OF_TORCHVISION.items()},
    "transformers Bert": partial(_texts, "Bert", _CLASSES),
    "transformers Roberta": partial(_texts, "Roberta", _CLASSES),
    "transformers DistilBert": partial(_texts, "DistilBert", _CLASSES, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "transformers Electra": partial(_texts, "Electra", _CLASSES, embedding_size=16),
    "transformers Albert": partial(_texts, "Albert", _CLASSES, embedding_size=16),
    "transformers DebertaV2": partial(_texts, "DebertaV2", _CLASSES),
    "transformers ModernBert": partial(_texts, "ModernBert", _CLASSES, cls_token_id=1, sep_token_id=2),
    "transformers GPT2 of classes": partial(_texts, "GPT2", _CLASSES, n_embd=32, n_layer=2, n_head=4),
    "transformers GPT2": partial(_texts, "GPT2", "LMHeadModel", n_embd=32, n_layer=2, n_head=4),
    "transformers Llama": partial(_texts, "Llama", _TOKENS, num_key_value_heads=2),
    "transformers Qwen2": partial(_texts, "Qwen2", _TOKENS, num_key_value_heads=2),
    "transformers Gemma": partial(_texts, "Gemma", _TOKENS, num_key_value_heads=2, head_dim=8),
    "transformers Mistral": partial(_texts, "Mistral", _TOKENS, num_key_value_heads=2),
    "transformers OPT": partial(_texts, "OPT", _TOKENS, ffn_dim=48, word_embed_proj_dim=32),
    "transformers GPTNeoX": partial(_texts, "GPTNeoX", _TOKENS),
    "transformers ViT": partial(_pictures, "ViT", **_VISION),
    "transformers DeiT": partial(_pictures, "DeiT", **_VISION),
    "transformers Beit": partial(_pictures, "Beit", **_VISION),
    "transformers Dinov2": partial(_pictures, "Dinov2", **_VISION),
    "transformers ResNet": partial(_pictures, "ResNet", embedding_size=8, **_STAGES),
    "transformers ConvNext": partial(_pictures, "ConvNext", 64, **_STAGES),
    "transformers Swin": partial(
        _pictures, "Swin", image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "builtin mlp": partial(_builtin, "mlp", (6,), sizes=[6, 8, N_CLASSES], norm="batch"),
    "builtin cnn": partial(_builtin, "cnn", (3, 16, 16), n_classes=N_CLASSES, channels=[8, 16]),
    "builtin resnet": partial(_builtin, "resnet", (3, 16, 16), n_classes=N_CLASSES, width=8),
    "builtin wide_resnet": partial(_builtin, "wide_resnet", (3, 16, 16), depth=10, n_classes=N_CLASSES, widen_factor=1),
}
# Those that every run of the tests looks at; the others belong to the campaign.
OFTEN = (
    *HAND_WRITTEN, "timm resnet18", "transformers Llama",
    "transformers ViT", "builtin wide_resnet",
)  # fmt: skip

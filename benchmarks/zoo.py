"""Networks of other people, small where they can be, with fresh weights: for the benchmarks of coverage and of exports.

Each entry makes a network in eval mode and an example that it runs on. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, Any]
Make = Callable[[], Made]

_SMALL = [
    *("test_", "atto", "femto", "pico", "nano", "xxs", "xx_small", "xxt", "_t0", "tiny", "_t_", "_xs", "mini", "_025", "_050"),
    *("small", "_s0", "_s_", "_s", "_b0", "18", "26", "mobile", "base", "50"),
]
"""What the names of small networks hold, the smaller ones first."""


def torchvision_networks() -> dict[str, Make]:
    """Every builder of torchvision: classification, detection, segmentation, video, optical flow."""
    from torchvision import models

    return {f"torchvision {name}": _of_torchvision(name) for name in models.list_models() if not name.startswith("quantized_")}


def _of_torchvision(name: str) -> Make:
    from torchvision import models

    def make() -> Made:
        options: dict[str, Any] = {"weights": None}
        where = models.get_model_builder(name).__module__
        if "detection" in where or "segmentation" in where:
            options["weights_backbone"] = None
        if name in ("googlenet", "inception_v3"):
            options |= {"init_weights": False, "aux_logits": False}
        model = models.get_model(name, **options).eval()
        if "detection" in where:
            return model, ([torch.rand(3, 160, 160)],)
        if "video" in where:
            side = 224 if "mvit" in name or "swin" in name else 56
            return model, torch.randn(1, 3, 16 if "mvit" in name else 8, side, side)
        if "optical_flow" in where:
            return model, (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
        side = 224 if "vit" in name else 299 if name == "inception_v3" else 96
        return model, torch.randn(2, 3, side, side)

    return make


def timm_networks() -> dict[str, Make]:
    """A small network of each of timm's families, as its modules divide them."""
    import timm

    found = {}
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        if names:
            found[f"timm {family}"] = _of_timm(min(names, key=_size))
    return found


def _size(name: str) -> tuple[int, int, str]:
    return next((at for at, mark in enumerate(_SMALL) if mark in name), len(_SMALL)), len(name), name


def _of_timm(name: str) -> Make:
    def make() -> Made:
        import timm

        model = timm.create_model(name, pretrained=False).eval()
        return model, torch.randn(2, *model.default_cfg["input_size"])

    return make


_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 99}
_DECODER = _TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
_BOTH = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 99,
}
"""Of an encoder and a decoder."""
_VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}

TRANSFORMERS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    **{
        name: (f"{name}Config", f"{name}Model", _TEXT | {"max_position_embeddings": 64})
        for name in (
            "Bert",
            "Roberta",
            "Electra",
            "Albert",
            "DebertaV2",
            "Deberta",
            "MPNet",
            "RoFormer",
            "Ernie",
            "MobileBert",
            "Nystromformer",
            "ConvBert",
            "Camembert",
            "XLMRoberta",
            "Longformer",
        )
    },
    "DistilBert": (
        "DistilBertConfig",
        "DistilBertModel",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 99},
    ),
    "GPT2 with a head": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64},
    ),
    **{
        name: (f"{name}Config", f"{name}ForCausalLM", _DECODER)
        for name in ("Llama", "Mistral", "Qwen2", "Gemma", "Phi", "GPTNeoX", "OPT", "StableLm", "Cohere", "Olmo", "Mixtral")
    },
    "T5": ("T5Config", "T5Model", {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99}),
    "Bart": ("BartConfig", "BartModel", _BOTH),
    **{name: (f"{name}Config", f"{name}Model", _VISION) for name in ("ViT", "DeiT", "Dinov2", "BeiT")},
    "ConvNext": ("ConvNextConfig", "ConvNextModel", {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}),
    "Segformer": ("SegformerConfig", "SegformerModel", {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}),
    "Wav2Vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2Model",
        {
            **_TEXT,
            "conv_dim": (32,) * 3,
            "conv_stride": (5, 2, 2),
            "conv_kernel": (10, 3, 2),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "Whisper": (
        "WhisperConfig",
        "WhisperModel",
        {
            **_BOTH,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "max_source_positions": 50,
        },
    ),
    "CLIP": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": _TEXT | {"max_position_embeddings": 64, "eos_token_id": 98}, "vision_config": _VISION},
    ),
}


def transformers_networks() -> dict[str, Make]:
    """Architectures of transformers from small configurations."""
    return {f"transformers {name}": _of_transformers(name, *parts) for name, parts in TRANSFORMERS.items()}


def _of_transformers(name: str, config: str, model: str, options: Mapping[str, Any]) -> Make:
    def make() -> Made:
        transformers = importlib.import_module("transformers")
        made = getattr(transformers, config)(**options, use_cache=False)
        network = getattr(transformers, model)(made).eval()
        ids, pixels = torch.randint(3, 90, (2, 12)), torch.randn(2, 3, 32, 32)
        if name in ("T5", "Bart"):
            return network, {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        if name == "Whisper":
            return network, {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": ids[:, :5]}
        if name == "Wav2Vec2":
            return network, {"input_values": torch.randn(2, 2000)}
        if name == "CLIP":
            return network, {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
        if name in ("ViT", "DeiT", "Dinov2", "BeiT", "ConvNext", "Segformer"):
            return network, {"pixel_values": pixels}
        return network, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return make


def torch_networks() -> dict[str, Make]:
    """What PyTorch itself holds."""

    def encoder() -> Made:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval(), torch.randn(2, 9, 64)

    def decoder() -> Made:
        layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128), 2)
        return layers.eval(), (torch.randn(5, 2, 64), torch.randn(9, 2, 64))

    def both() -> Made:
        return nn.Transformer(64, 4, 2, 2, 128).eval(), (torch.randn(9, 2, 64), torch.randn(5, 2, 64))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.body, self.head = nn.Conv1d(8, 64, 5), nn.LSTM(64, 64, 2, batch_first=True), nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.body(self.front(x).mT)[0])

    class Upsampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU())
            up = [nn.ConvTranspose2d(64, 32, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1)]
            self.up = nn.Sequential(*up)

        def forward(self, x: torch.Tensor) -> Any:
            return self.up(self.down(x))

    return {
        "torch TransformerEncoder": encoder,
        "torch TransformerDecoder": decoder,
        "torch Transformer": both,
        "torch Conv1d and LSTM": lambda: (Recurrent().eval(), torch.randn(2, 8, 40)),
        "torch ConvTranspose2d": lambda: (Upsampling().eval(), torch.randn(2, 3, 32, 32)),
    }


def _installed(package: str, make: Callable[[], dict[str, Make]]) -> dict[str, Make]:
    try:
        importlib.import_module(package)
    except ImportError:
        return {}
    return make()


def other_networks() -> dict[str, Make]:
    """Those of packages that may be there: segmentation-models-pytorch, open_clip, ultralytics."""

    def segmentation() -> dict[str, Make]:
        smp = importlib.import_module("segmentation_models_pytorch")

        def of(kind: str) -> Make:
            return lambda: (
                getattr(smp, kind)("resnet18", encoder_weights=None).eval(), torch.randn(1, 3, 64, 64),
            )  # fmt: skip

        return {
            f"segmentation-models {kind}": of(kind) for kind in ("Unet", "FPN", "DeepLabV3Plus", "Linknet", "PSPNet", "MAnet")
        }

    def clip() -> dict[str, Make]:
        open_clip = importlib.import_module("open_clip")

        def of(name: str) -> Make:
            def make() -> Made:
                model = open_clip.create_model(name, pretrained=None).eval()
                return model, (torch.randn(1, 3, 224, 224), torch.randint(1, 999, (1, 77)))

            return make

        return {f"open_clip {name}": of(name) for name in ("ViT-B-32", "RN50")}

    return {
        **_installed("segmentation_models_pytorch", segmentation),
        **_installed("open_clip", clip),
    }


def networks() -> dict[str, Make]:
    """All of them, by name."""
    sources: Iterable[dict[str, Make]] = (
        torch_networks(),
        _installed("torchvision", torchvision_networks),
        _installed("transformers", transformers_networks),
        _installed("timm", timm_networks),
        other_networks(),
    )
    return {name: make for source in sources for name, make in source.items()}


def apart(script: str, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """What a script prints of one network in a process of its own, a line of JSON; or the error that ended it."""
    command = [sys.executable, script, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("{")), None)
    if line:
        return dict(json.loads(line))
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300], "code": done.returncode}

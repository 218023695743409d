"""What holds for every test: no network, a fixed number of threads, markers that say why."""

import os
import sys
from collections.abc import Iterator

# Before any test module can import a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "1"  # equality to the bit is claimed for the CPU
# Beside other workers a second thread only waits for them. A worker inherits what the process that
# starts it has set here, so that it must not be a default.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {}
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            reasons["gpu"] = "needs a CUDA device"
    if os.environ.get("EXPUNGE_NETWORK") != "1":
        reasons["network"] = "needs the internet: set EXPUNGE_NETWORK=1"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    # First what takes minutes: at the end one worker would be left alone with it.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A test that sets the number of threads sets it for itself."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if before:
        torch.set_num_threads(before)


def _tiny_tokenizer():
    from transformers import CLIPTokenizer

    from expunge.backbones import bundled

    return CLIPTokenizer.from_pretrained(bundled("emoji") / "tokenizer")


def _tiny_text_config(tokenizer, **settings):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


def _tiny_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )


def _tiny_unet(**settings):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        **settings,
    )


def _tiny_pipeline(folder, prediction_type: str, linear: bool) -> str:
    """A random Stable Diffusion of the real classes, small enough for a test, saved to `folder`."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    tokenizer = _tiny_tokenizer()
    torch.manual_seed(0)
    unet = _tiny_unet(
        cross_attention_dim=32,
        attention_head_dim=[2, 4] if linear else 2,
        use_linear_projection=linear,
    )
    vae = _tiny_vae()
    text_encoder = CLIPTextModel(
        _tiny_text_config(tokenizer, hidden_act="gelu" if linear else "quick_gelu")
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def _tiny_sdxl(folder) -> str:
    """The same for SDXL: two text encoders, pooled embeddings and sizes, Euler."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _tiny_tokenizer()
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        vae=_tiny_vae(),
        unet=_tiny_unet(
            cross_attention_dim=64,
            attention_head_dim=[2, 4],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            # The pooled embedding and six sizes.
            projection_class_embeddings_input_dim=32 + 6 * 8,
        ),
        text_encoder=CLIPTextModel(_tiny_text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(
            _tiny_text_config(tokenizer, hidden_act="gelu", projection_dim=32)
        ),
        tokenizer=tokenizer,
        tokenizer_2=_tiny_tokenizer(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny pipeline of SD 1.x's shape (ε-prediction)."""
    return _tiny_pipeline(tmp_path_factory.mktemp("tiny-sd1"), "epsilon", linear=False)


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny pipeline of SD 2.x's shape (v-prediction, linear projections)."""
    return _tiny_pipeline(tmp_path_factory.mktemp("tiny-sd2"), "v_prediction", linear=True)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an open_clip model of the bundled guide's shape: random, small, and it can read."""
    import json
    import shutil

    import open_clip
    import torch
    from safetensors.torch import save_file

    from expunge.backbones import bundled

    folder = tmp_path_factory.mktemp("tiny-clip")
    tokenizer = bundled("emoji") / "tokenizer"
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": [1, 1, 1, 1],
            "width": 8,
            "head_width": 32,
            "patch_size": None,
        },
        "text_cfg": {
            "context_length": 24,
            "vocab_size": max(vocabulary.values()) + 1,
            "width": 32,
            "heads": 2,
            "layers": 1,
            "hf_tokenizer_name": ".",
        },
    }
    # Unlike ImageNet's figures and OpenAI's, so that a test can tell whose were used.
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    # As open_clip starts a network, all pictures look alike to it.
    for name, weight in model.visual.named_parameters():
        if weight.ndim == 4:
            torch.nn.init.kaiming_normal_(weight)
        elif name.endswith("bn3.weight"):
            torch.nn.init.ones_(weight)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny pipeline of SDXL's shape (two text encoders, added conditions)."""
    return _tiny_sdxl(tmp_path_factory.mktemp("tiny-sdxl"))


@pytest.fixture
def loaded_clips(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every CLIP that a test makes."""
    from expunge.clip import Clip

    found, real = [], Clip.__init__

    def recorded(self, *args, **options):
        real(self, *args, **options)
        found.append(self)

    monkeypatch.setattr(Clip, "__init__", recorded)
    return found

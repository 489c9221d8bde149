"""Our PyTorch module computes what our JAX model computes: layers, whole, gradient, after training.

Tolerances: 1e-5 a layer, 1e-4 end to end, float32.
"""

import io
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from batches import random_batch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image
from runner import Runner, batch_for
from tiny import tiny_config
from torch_export import Pair, embed, embed_with_torch, make_pair, to_torch

from instap_jax import losses
from instap_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from instap_jax.interop import torch_model
from instap_jax.models import preprocess
from instap_jax.models.text import text_mask
from instap_jax.models.vision import position_codes

LAYER, WHOLE = 1e-5, 1e-4


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair(tiny_config("stage2"))


def batch_of(config: ConfigDict, frames: int = 2, seed: int = 0):
    batch = random_batch(
        groups=1,
        group_size=3,
        frames=frames,
        canvas=(24, 32),
        text_length=8,
        vocab_size=config.text.vocab_size,
        seed=seed,
    )
    batch["present"][0, 0] = False  # an instance that but one frame shows
    batch["present"][..., -1] = True
    return batch


def differ(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs.detach().numpy()).max())


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def test_every_layer_of_the_encoder(pair):
    video = normal(2, 3, 16, 16, 3)
    mask = np.random.default_rng(0).random((2, 3 * 16)) < 0.7
    depth = pair.config.vision.depth
    for kept in (None, mask):
        ours = pair.ours.encoder(video, taps=depth, mask=kept).taps
        kept = None if kept is None else torch.from_numpy(kept)
        theirs = pair.theirs.vision_encoder.encoder(torch.from_numpy(video), kept, depth)
        assert theirs.shape == ours.shape == (depth, 2, 48, 32)
        assert differ(ours, theirs) < LAYER
    heads = pair.ours.heads(ours, position_codes(3, 16, 32))
    codes = torch_model.position_codes(48, 32)
    for k, head in enumerate(pair.theirs.vision_encoder.clip_decoder):
        assert differ(heads[k], head["norm"](head["head"](theirs[k] + codes))) < LAYER


def test_every_layer_of_the_text_tower(pair):
    ids = batch_of(pair.config)["text"][0]
    visual, here = normal(3, 5, 32), np.array([[1, 1, 0, 1, 0]] * 3, bool)
    ours, bert = pair.ours.text, pair.theirs.text_encoder.bert
    tids = torch.from_numpy(ids).long()
    tokens, theirs = ours.encode(ids).tokens, bert.encode(tids)
    real = ids != 0
    assert differ(tokens[real], theirs[torch.from_numpy(real)]) < LAYER
    for mask in (None, here):
        fused = ours.fuse(tokens, text_mask(ids), visual, visual_mask=mask)
        mask = None if mask is None else torch.from_numpy(mask)
        other = bert.fuse(theirs, tids != 0, torch.from_numpy(visual), mask)
        assert differ(fused[real], other[torch.from_numpy(real)]) < LAYER
    logits = pair.theirs.text_encoder.mlm_logits(other)
    assert differ(ours.mlm_logits(fused)[real], logits[torch.from_numpy(real)]) < LAYER
    assert differ(pair.ours.match_head(fused), pair.theirs.itm_head(other[:, 0])) < LAYER


def test_every_layer_of_the_cross_attention(pair):
    crops, scene = normal(2, 4, 32), normal(7, 32)
    mask = np.ones((1, 2, 4), bool)
    parent = np.zeros((1, 2), np.int32)
    ours = pair.ours.cross_attention(crops[None], scene[None, None], parent, mask=mask).tokens[0]
    theirs = torch.from_numpy(crops)
    for block in pair.theirs.cross_attention["blocks"]:
        theirs = block(theirs, torch.from_numpy(scene))
    assert differ(ours, theirs) < LAYER


# Every option that changes what is computed; several at once, to compile less.
VARIANTS = {
    "default": {},
    "anchored, still, other sizes": {
        "align.scene_anchor": True,
        "align.still_boxes": True,
        "vision.image_size": 24,
        "vision.patch": 6,
        "align.crop_size": 12,
        "frames": 4,  # an even number has two middles
    },
    "one frame, without cross-attention, whole crops, one temperature": {
        "frames": 1,
        "align.cross_attention": False,
        "align.crop_size": None,
        "align.own_temperature": False,
    },
    "box codes, wider crops, sigmoid, two blocks": {
        "align.size_code": True,
        "align.motion_code": True,
        "align.crop_context": 1.5,
        "contrastive.loss": "sigmoid",
        "align.cross_attention_depth": 2,
    },
    "no instance terms, anchored": {"align.instance": 0.0, "align.scene_anchor": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_model_from_the_same_pixels(name):
    changes = dict(VARIANTS[name])
    frames = changes.pop("frames", 2)
    pair = make_pair(tiny_config("stage2", **changes))
    batch = batch_of(pair.config, frames)
    ours, theirs = embed(pair, batch), embed_with_torch(pair, batch)
    for key in ours:
        assert np.isfinite(theirs[key]).all()
        np.testing.assert_allclose(theirs[key], ours[key], atol=WHOLE, rtol=0, err_msg=key)
        if theirs[key].ndim == 2:
            np.testing.assert_allclose(np.linalg.norm(theirs[key], axis=1), 1, atol=1e-5)
    taus = [tau.item() for tau in pair.theirs.temperatures()]
    np.testing.assert_allclose(taus, [pair.ours.tau(), pair.ours.instance_tau()], rtol=1e-6)


def test_after_training():
    config = tiny_config("stage2")
    runner = Runner(config, devices=1)
    state, _ = runner.run(batch_for(config, groups=1), steps=20)
    pair = make_pair(config, state.params)
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), state.params, runner.initial.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-3
    batch = batch_of(config)
    ours, theirs = embed(pair, batch), embed_with_torch(pair, batch)
    for key in ours:
        np.testing.assert_allclose(theirs[key], ours[key], atol=WHOLE, rtol=0, err_msg=key)


def test_gradient_of_the_contrastive_loss(pair):
    video, ids = normal(3, 2, 16, 16, 3), batch_of(pair.config)["text"][0]
    different = np.arange(3, dtype=np.int32)

    def loss(params):
        model = nnx.merge(pair.graphdef, params)
        v = model.embed_visual(model.encoder(video).tokens.mean(1))
        t = model.embed_text(model.text.encode(ids).pooled)
        valid = jnp.ones(3, bool)
        return losses.contrastive_loss(
            v, t, model.tau(), valid=valid, video_ids=different, text_ids=different
        ).loss

    value, ours = jax.jit(jax.value_and_grad(loss))(pair.params)
    model = pair.theirs
    model.zero_grad()
    tokens = model.vision_encoder.encoder(torch.from_numpy(video))
    v = model.vision_proj(model.vision_encoder.pool_norm(tokens.mean(1)))
    logits = torch.nn.functional.normalize(v, dim=-1) @ model.encode_text(ids).T
    logits, target = logits / model.temperatures()[0], torch.arange(3)
    cross_entropy = torch.nn.functional.cross_entropy
    theirs = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    expected, reached = to_torch(ours), 0
    for key, parameter in model.named_parameters():
        if parameter.grad is None:
            assert not expected[key].any(), key
            continue
        reached += bool(parameter.grad.any())
        scale = max(1.0, float(expected[key].abs().max()))
        assert differ(expected[key].numpy(), parameter.grad) < WHOLE * scale, key
    assert reached > 50


@pytest.mark.parametrize("size", [(64, 48), (37, 111)])
def test_pictures_of_the_same_jpeg(size):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    frames = np.asarray(Image.open(file))[None]
    boxes = np.array(
        [[0, 0, 1, 1], [0.2, -0.1, 0.7, 0.5], [0.9, 0.9, 0.95, 1], [0.3, 0.3, 0.3, 0.3]]
    )
    for box in boxes.astype(np.float32)[:, None]:
        ours = preprocess.crop_and_resize(frames, box, np.ones(2, np.float32), 16)
        theirs = torch_model.crop_and_resize(
            torch.from_numpy(frames.copy()), torch.from_numpy(box), 16
        )
        assert differ(ours / 255, theirs / 255) < LAYER


TEXT = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", "[MASK] [SEP]", "A  red\tball.", "a red-ball, isn't / it?", "\ud800x"]),
)


def _words(tmp: Path, kind: str) -> Path:
    path = tmp / f"words.{kind}"
    if kind == "sentencepiece":
        path.write_bytes(train_sentencepiece(["a red ball rolls to the left"] * 3, 300))
    else:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ball", "##s", ".", "é"]
        path.write_text("\n".join(words) + "\n")
    return path


@pytest.mark.parametrize("clean", ["plain", "umt"])
@pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece"])
def test_tokenizers_agree(kind, clean, tmp_path_factory):
    path = _words(tmp_path_factory.mktemp("words"), kind)
    config = {"kind": kind, "path": str(path), "length": 9, "text": clean}
    ours = load_tokenizer(ConfigDict(config))
    theirs = torch_model.Tokenizer(path, kind, 9, clean)

    @settings(max_examples=40, deadline=None)
    @given(TEXT)
    def agree(text):
        np.testing.assert_array_equal(theirs([text])[0].numpy(), ours.encode(text, 9))

    agree()


def test_wrong_inputs_are_named(pair):
    frames, box = np.zeros((1, 2, 16, 16, 3), np.uint8), np.zeros((1, 3, 2, 4), np.float32)
    model = pair.theirs
    with pytest.raises(ValueError, match="uint8"):
        model.encode_video(frames.astype(np.float32))
    with pytest.raises(ValueError, match="fractions"):
        model.encode_instances(frames, box + 17)
    with pytest.raises(ValueError, match=r"must be \[n, 2, 4\]"):
        model.encode_instances(frames, box[:, :, :1])
    with pytest.raises(ValueError, match="1 clips and 2 texts"):
        model.match(frames, np.zeros((2, 8), np.int64))
    nan, nowhere = box.copy(), np.ones((1, 3, 2), bool)
    nan[0, 1, 1, 2] = np.nan
    with pytest.raises(ValueError, match="not pixels, and finite"):
        model.encode_instances(frames, nan)
    nowhere[0, 2] = False
    with pytest.raises(ValueError, match="must be present in at least one frame"):
        model.encode_instances(frames, box, nowhere)
    with pytest.raises(ValueError, match="texts must be a sequence of texts, not one"):
        model.encode_text("a red ball")
    with pytest.raises(ValueError, match="uint8"):
        model.encode_video(frames[:, :0])
    with pytest.raises(ValueError, match="3 instances and 2 texts"):
        model.match_instances(frames, box, [["a", "b"]])
    model.config["trained"] = {"terms": ["vtc"]}
    with pytest.raises(ValueError, match="the run had no term 'vtm'"):
        model.match(frames, np.zeros((1, 8), np.int64))


def test_nothing_and_other_sequences_are_taken(pair, tmp_path):
    model = torch_model.InstAP(pair.theirs.config, torch_model.Tokenizer("/none", "none", 8)).eval()
    with torch.inference_mode():
        assert model.encode_video([]).shape == (0, 16)  # and no tokenizer is opened
        assert model.match([], np.zeros((0, 8), np.int64)).shape == (0,)
        assert model.encode_instances([], []) == []
        path = _words(tmp_path, "sentencepiece")
        model.tokenizer = torch_model.Tokenizer(path, "sentencepiece", 8)
        listed, tupled = (model.encode_text(kind(["a", "b"])) for kind in (list, tuple))
        assert torch.equal(listed, tupled) and model.encode_text([]).shape == (0, 16)


def test_module_needs_neither_jax_nor_us():
    code = (
        "import sys\n"
        "for name in ('jax', 'flax', 'instap_jax', 'ml_collections'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(Path(torch_model.__file__).parent)!r})\n"
        "import torch_model\nassert torch_model.InstAP\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""What the objectives hand to their parts, which are stand-ins that keep what they are given."""

from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runner import batch_for
from test_align import Matcher, align_config, texts_of
from tiny import tiny_config

from instap_jax import losses
from instap_jax.losses import ContrastiveOutput
from instap_jax.models import boxes, instances, preprocess
from instap_jax.models.instap import InstanceFeatures
from instap_jax.models.placement import flat
from instap_jax.models.teacher import ClipVisionOutput
from instap_jax.models.vision import PositionGrid
from instap_jax.train.objectives import align, objective
from instap_jax.train.objectives.instances import see_instances
from instap_jax.train.objectives.pairs import Pairs, Reading, matching
from instap_jax.train.objectives.views import View, choose_visible, guide
from instap_jax.types import IGNORED_TARGET

CONTRAST = ContrastiveOutput(loss=0.0, accuracy_v2t=0.0, accuracy_t2v=0.0)
KEY = jax.random.key(0)


def teacher_of(config, frames: int) -> Mock:
    """Stands for a CLIP whose features are zero."""
    patches = (config.teacher.image_size // config.teacher.patch) ** 2
    scores = jnp.ones((frames, patches))
    taps = jnp.zeros((config.distill.layers, frames, patches, 1))
    return Mock(
        return_value=ClipVisionOutput(
            embedding=None, taps=taps, cls_attention=scores, received=scores
        )
    )


def instap_of(config) -> Mock:
    """Stands for InstAP: tokens are the ids of texts; embeddings are what is embedded."""

    def encode(video, *, visible, **_):
        shape = (*visible.shape, 1)
        return SimpleNamespace(
            tokens=jnp.zeros(shape), taps=jnp.zeros((config.distill.layers, *shape))
        )

    def encode_instances(crops, mask, *_, **__):
        shape = crops.shape[:2]
        return InstanceFeatures(
            crop=jnp.full((*shape, 1), 1.0),
            tokens=jnp.full((*mask.shape, 1), 2.0),
            pooled=jnp.full((*shape, 1), 3.0),
            mask=mask,
        )

    model = Mock()
    model.encoder.side_effect = encode
    model.encoder.positions = PositionGrid()
    model.encode_instances.side_effect = encode_instances
    model.predict_teacher.side_effect = lambda taps, **_: taps
    model.text.encode.side_effect = lambda ids, **_: SimpleNamespace(tokens=1.0 * ids[..., None])
    model.text.fuse_together.side_effect = lambda texts, **_: texts
    model.embed_visual = model.embed_text = lambda pooled: pooled
    model.tau.return_value, model.instance_tau.return_value = jnp.float32(0.25), jnp.float32(0.5)
    model.bias.return_value = model.instance_bias.return_value = None
    return model


def black_batch(config) -> dict:
    """Two groups of black clips, an instance unused and a sample not read in each."""
    batch = batch_for(config, groups=2)
    batch["frames"][:] = 0
    batch["instance_valid"][:, 0] = batch["sample_valid"][:, 1] = False
    return batch


def reading(*_) -> Reading:
    """A term that gets back from the fusion layers what was its own."""
    texts = object()

    def loss(fused):
        assert fused is texts
        return 0.0, {}

    return Reading(texts=texts, loss=loss)


def see(config) -> SimpleNamespace:
    """What all parts of stage 'align' are given of one batch."""
    batch = black_batch(config)
    model, teacher = instap_of(config), teacher_of(config, batch["frames"][..., 0, 0, 0].size)
    contrast, instance_contrast = Mock(return_value=CONTRAST), Mock(return_value=CONTRAST)
    match, words = Mock(side_effect=reading), Mock(side_effect=reading)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "contrastive_loss", contrast)
        patch.setattr(losses, "instance_contrastive_loss", instance_contrast)
        patch.setattr(align, "matching", match)
        patch.setattr(align, "masked_language", words)
        objective(config).loss(config, model, teacher, batch, KEY)
    return SimpleNamespace(**locals())


@pytest.fixture(scope="module")
def seen():
    changes = {"align.mlm_ratio": 1.0, "align.alpha": 0.25, "align.crop_mask_ratio": 0.5}
    return see(align_config(**changes, **{"data.batch_size": 4}))


def of_parents(batch, name: str):
    return np.take_along_axis(batch[name], batch["parent"], axis=1)


def valid_instances(batch):
    return batch["instance_valid"] & of_parents(batch, "sample_valid")


def given(call: Mock, *names: str) -> list:
    return [call.call_args.kwargs[name] for name in names]


def assert_black(pixels, constants):
    """Of the network that was trained with these constants."""
    mean, deviation = map(np.array, constants)
    np.testing.assert_allclose(pixels, np.broadcast_to(-mean / deviation, pixels.shape), rtol=1e-5)


def test_every_network_has_its_own_normalisation(seen):
    assert_black(seen.teacher.call_args.args[0], preprocess.CLIP)
    assert_black(seen.model.encoder.call_args.args[0], preprocess.IMAGENET)
    assert_black(seen.model.encode_instances.call_args.args[0], preprocess.IMAGENET)


def test_every_draw_has_a_key_of_its_own(seen):
    model = seen.model
    networks = (model.encoder, model.text.encode, model.encode_instances, model.text.fuse_together)
    keys = [network.call_args.kwargs.get("key") for network in networks]
    keys += [call.args[-1] for call in seen.match.call_args_list]
    assert len(keys) == 6 and all(key is not None for key in keys)
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 6


def test_all_texts_are_fused_at_once(seen):
    (texts,) = seen.model.text.fuse_together.call_args.args
    assert len(texts) == 4  # and `reading` holds each to its own


def test_samples_are_contrasted_with_their_captions(seen):
    """Equation (2), a caption at its [CLS]."""
    batch, (_, text, tau) = seen.batch, seen.contrast.call_args.args
    np.testing.assert_array_equal(text, flat(batch["text"])[:, :1])
    assert tau == 0.25
    names = {"valid": "sample_valid", "video_ids": "media_hash", "text_ids": "text_hash"}
    for found, name in zip(given(seen.contrast, *names), names.values()):
        np.testing.assert_array_equal(found, flat(batch[name]), err_msg=name)


def test_instances_are_contrasted_with_their_sentences(seen):
    """Equation (8)."""
    batch, (pooled, text, tau) = seen.batch, seen.instance_contrast.call_args.args
    np.testing.assert_array_equal(pooled, 3.0)
    np.testing.assert_array_equal(text, flat(batch["instance_text"])[:, :1])
    assert tau == 0.5
    valid, parents, texts, alpha = given(
        seen.instance_contrast, "valid", "parent_ids", "text_ids", "alpha"
    )
    np.testing.assert_array_equal(valid, flat(valid_instances(batch)))
    np.testing.assert_array_equal(parents, flat(of_parents(batch, "media_hash")))
    np.testing.assert_array_equal(texts, flat(batch["instance_text_hash"]))
    assert alpha == 0.25


def test_texts_are_matched_with_tokens_of_scenes_and_with_mean_crops(seen):
    """Equations (3) and (9)."""
    (_, _, ids, _, tokens, _), (_, _, instance_ids, _, crops, _) = (
        call.args for call in seen.match.call_args_list
    )
    np.testing.assert_array_equal(ids, seen.batch["text"])
    np.testing.assert_array_equal(tokens, 0.0)
    np.testing.assert_array_equal(instance_ids, seen.batch["instance_text"])
    np.testing.assert_array_equal(crops, np.ones((2, 4, 1, 1)))


def test_words_are_masked_as_configured(seen):
    """Equations (4) and (10), every word masked: neither padding nor [CLS] is one."""
    tokenizer = seen.config.tokenizer
    for call, name in zip(seen.words.call_args_list, ("text", "instance_text"), strict=True):
        ids, targets, original = call.args[1], call.args[2], seen.batch[name]
        word = ~np.isin(original, (0, tokenizer.cls_id))
        np.testing.assert_array_equal(targets != IGNORED_TARGET, word)
        assert (np.asarray(ids)[word] == tokenizer.mask_id).mean() > 0.5
        np.testing.assert_array_equal(call.args[3][..., 0], ids)  # encoded as masked
    tokens, mask = seen.words.call_args.args[4:6]
    np.testing.assert_array_equal(tokens, 2.0)
    np.testing.assert_array_equal(mask, seen.model.encode_instances.call_args.args[1])


def test_crops_are_masked_as_configured(seen):
    """Half of 2 x 2 tokens in each of two frames."""
    assert given(seen.model.encode_instances, "visible")[0].shape == (2, 4, 4)


def test_sentences_as_further_captions_are_pairs_of_their_whole_videos():
    config = tiny_config("stage2,umt_gi", **{"data.frames": 2, "data.batch_size": 4})
    seen = see(config)
    batch = seen.batch
    valid, videos, texts = (
        found.reshape(2, -1) for found in given(seen.contrast, "valid", "video_ids", "text_ids")
    )
    np.testing.assert_array_equal(valid[:, :2], batch["sample_valid"])
    np.testing.assert_array_equal(valid[:, 2:], valid_instances(batch))
    np.testing.assert_array_equal(videos[:, :2], batch["media_hash"])
    np.testing.assert_array_equal(videos[:, 2:], of_parents(batch, "media_hash"))
    np.testing.assert_array_equal(texts[:, 2:], batch["instance_text_hash"])


def test_distillation_shows_one_view_to_both_networks():
    config = tiny_config("stage1", **{"data.frames": 2, "data.batch_size": 4})
    batch, layers = black_batch(config), config.distill.layers
    teacher = teacher_of(config, batch["frames"][..., 0, 0, 0].size)
    student = Mock(side_effect=lambda _, *, visible, key: jnp.zeros((layers, *visible.shape, 1)))
    objective(config).loss(config, student, teacher, batch, KEY)
    assert_black(teacher.call_args.args[0], preprocess.CLIP)
    assert_black(student.call_args.args[0], preprocess.IMAGENET)
    assert student.call_args.kwargs["key"] is not None


def test_a_teacher_is_trained_on_pairs_of_a_picture_and_its_sentence(monkeypatch):
    config = tiny_config("teacher", **{"data.batch_size": 4})
    batch, model = black_batch(config), Mock()
    model.embed_images.side_effect = lambda images: images[:, 0, 0]
    monkeypatch.setattr(losses, "contrastive_loss", contrast := Mock(return_value=CONTRAST))
    objective(config).loss(config, model, None, batch, KEY)
    assert_black(contrast.call_args.args[0], preprocess.CLIP)
    names = {"valid": "sample_valid", "video_ids": "media_hash", "text_ids": "text_hash"}
    for found, name in zip(given(contrast, *names), names.values()):
        np.testing.assert_array_equal(found, flat(batch[name]), err_msg=name)


def test_labels_are_smoothed_as_configured():
    config = tiny_config("classify", **{"classify.smoothing": 0.5, "data.batch_size": 4})
    batch = batch_for(config, groups=2)
    certain = 20.0 * jax.nn.one_hot(flat(batch["label"]), 4)
    loss, _ = objective(config).loss(config, Mock(return_value=certain), None, batch, KEY)
    assert loss == pytest.approx(0.5 * 20 * 3 / 4, rel=1e-3)


@pytest.mark.parametrize("score", ["cls", "received"])
def test_masks_keep_the_best_of_every_frame_by_the_score_that_is_asked_for(score):
    config = tiny_config("stage1", **{"distill.mask_score": score, "distill.mask_choice": "topk"})
    clips, frames, patches, kept = 2, 3, 16, 4
    rng = np.random.default_rng(0)
    scores = {name: rng.random((clips * frames, patches)) for name in ("cls", "received")}
    teacher = Mock(
        return_value=ClipVisionOutput(
            embedding=None, taps=None, cls_attention=scores["cls"], received=scores["received"]
        )
    )
    images = jnp.zeros((clips, frames, 12, 12, 3))
    visible = guide(config, teacher, images, KEY, ratio=1 - kept / patches, taps=0).visible
    best = np.sort(np.argsort(-scores[score])[:, :kept]).reshape(clips, frames, kept)
    expected = best + patches * np.arange(frames)[:, None]
    np.testing.assert_array_equal(visible, expected.reshape(clips, -1))


def test_masks_are_drawn_unless_the_best_are_asked_for():
    config, scores = tiny_config("stage1"), jnp.ones((1, 32))
    first = {}
    for choice in ("sample", "topk"):
        config.distill.mask_choice = choice
        visible = choose_visible(config, KEY, scores, frames=2, ratio=0.5)
        first[choice] = (visible == jnp.asarray([*range(8), *range(16, 24)])).all()
    assert first == {"sample": False, "topk": True}


class Crops:
    """The instance branch, its model a stand-in."""

    def __init__(self, **changes):
        self.config = align_config(**{"data.batch_size": 4} | changes)
        self.batch = batch_for(self.config, groups=2)
        self.model = instap_of(self.config)
        self.model.box_codes.side_effect = lambda box, _: jnp.zeros((*box.shape[:-1], 1))

    def see(self, view, flip: bool, **options) -> tuple[tuple, dict]:
        shape = self.batch["extent"].shape[:2]
        view = View(
            boxes=jnp.broadcast_to(jnp.asarray(view), (*shape, 4)), flip=np.full(shape, flip)
        )
        see_instances(self.config, self.model, self.batch, None, view, **options)
        return self.model.encode_instances.call_args


WHOLE = (0.0, 0.0, 1.0, 1.0)


def test_an_instance_is_mirrored_with_its_scene():
    crops = Crops()
    plain, mirrored = (crops.see(WHOLE, flip).args[0] for flip in (False, True))
    np.testing.assert_allclose(mirrored, plain[..., ::-1, :], atol=1e-4)
    assert np.abs(mirrored - plain).max() > 0.1


def test_boxes_are_coded_as_the_view_shows_them():
    """The left half of a mirrored view of the right half is the picture's last quarter."""
    on = {"align.scene_anchor": True, "align.size_code": True, "vision.width": 8}
    crops = Crops(**on)
    crops.batch["boxes"][:] = 0.75, 0, 1, 1
    codes = crops.see((0.5, 0, 1, 1), True).kwargs["codes"]
    (box, _), expected = crops.model.box_codes.call_args.args, np.float32([0, 0, 0.5, 1])
    np.testing.assert_allclose(box, np.broadcast_to(expected, box.shape), atol=1e-6)
    in_view = jnp.broadcast_to(expected, box.shape)
    anchors = boxes.scene_codes(in_view, crop_side=2, scene_side=4, width=8)
    np.testing.assert_allclose(codes, anchors, atol=1e-5)


def test_the_mask_of_a_crop_is_that_of_its_visible_tokens():
    crops = Crops()
    crops.batch["present"][:] = False, True
    (_, mask, *_), options = crops.see(WHOLE, False, mask_ratio=0.5, mask_key=KEY)
    np.testing.assert_array_equal(mask, options["visible"] >= 4)  # the second frame's


def test_every_part_of_the_crops_draws_for_itself():
    encoder = Mock(remat="all")
    encoder.side_effect = lambda crops, *, key, **_: SimpleNamespace(
        tokens=jax.random.normal(key, (len(crops), 1, 1))
    )
    crops, mask = jnp.zeros((4, 1, 2, 2, 3)), jnp.ones((4, 1), bool)
    tokens = instances.encode_crops(encoder, crops, None, mask, at_most=2, key=KEY)
    assert len(np.unique(tokens)) == 4


def test_negatives_are_the_most_similar_by_rows_and_by_columns():
    """Video i is most similar to text i - 1, so that text i is most similar to video i + 1."""
    number = np.arange(4, dtype=np.int32)[None]
    pairs = Pairs(
        video=jnp.eye(4)[None],
        text=(jnp.eye(4) + 2 * jnp.roll(jnp.eye(4), 1, axis=1))[None],
        tau=jnp.float32(0.01),
        valid=jnp.ones((1, 4), bool),
        video_ids=jnp.asarray(number),
        text_ids=jnp.asarray(number),
    )
    model, carried = Matcher(), jnp.asarray(number[..., None, None], jnp.float32)
    for seed in range(3):
        key = jax.random.key(seed)
        model.judge(matching(model, pairs, texts_of(number), carried, carried, key))
        _, videos, texts = model.pairs.reshape(3, 4, 2)
        np.testing.assert_array_equal(videos[:, 0], [1, 2, 3, 0])
        np.testing.assert_array_equal(texts[:, 1], [3, 0, 1, 2])

"""InstAP in PyTorch: the whole trained model, in one file that needs neither JAX nor instap_jax.

Needs torch, safetensors and numpy; for texts also sentencepiece or tokenizers, whichever the model
was trained with. `instap convert --to=torch` writes a directory that holds this file too:

    model = InstAP.from_pretrained("EXPORT").eval()
    with torch.inference_mode():
        video = model.encode_video(frames)        # uint8 [B, T, H, W, 3] -> [B, p]
        text = model.encode_text(["a red ball rolls"])  # -> [1, p]
        similarity = text @ video.T

Modules carry UMT's names where the structure is UMT's (multi_modality/models/umt.py,
backbones/vit/vit.py, backbones/bert/xbert.py), so that the weights of either load into the other:
`vision_encoder`, `text_encoder`, `vision_proj`, `text_proj`, `itm_head`, `temp`. InstAP's own are
`cross_attention` and `instance_temp`.

Letters: B clips, T frames, H W pixels, S side of the square the network sees, V visual tokens of a
clip, n instances of a clip, s text length, d width, p shared embedding.
"""

import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

FORMAT = "instap-torch-1"
VISION_EPSILON = 1e-6  # of LayerNorm (UMT)
TEXT_EPSILON = 1e-12  # of LayerNorm (BERT)
PAD_ID = 0
OCTAVES = 4  # of the waves that describe sizes and motion


def attend(q, k, v, heads, mask=None):
    """Multi-head attention: q [B, n, d], k and v [B, m, d], mask bool [B, m] of attendable keys."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        floor = torch.finfo(q.dtype).min  # not -inf: a row without any key is uniform, not NaN
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, floor)[:, None, None, :]
    return functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class QueryKeyValue(nn.Module):
    """Multi-head attention up to its output projection; the context may have another width."""

    def __init__(self, width, context_width, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)

    def forward(self, x, context, mask=None):
        return attend(self.query(x), self.key(context), self.value(context), self.heads, mask)


class VisionAttention(nn.Module):
    """Self-attention without a key bias."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(q + self.q_bias, k, v + self.v_bias, self.heads, mask))


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=VISION_EPSILON)
        self.attn = VisionAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=VISION_EPSILON)
        maps = {"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)}
        self.mlp = nn.ModuleDict(maps)

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Encoder(nn.Module):
    """The student f: joint space-time attention over all patches, no class token."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        patch = (1, c["patch"], c["patch"])
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, c["width"], patch, patch)})
        sizes = c["width"], c["heads"], int(c["width"] * c["mlp_ratio"] + 1e-6)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(c["depth"]))
        self.norm = nn.LayerNorm(c["width"], eps=VISION_EPSILON)

    def forward(self, video, mask=None, taps=0):
        """Normalised clips [B, T, S, S, 3] -> [B, V, d]; with taps, the last so many layers in
        their order, [taps, B, V, d]; after the final LayerNorm. mask: bool [B, V], tokens that may
        be attended to."""
        p, proj = self.config["patch"], self.patch_embed["proj"]
        b, t, height, width, _ = video.shape
        x = video.reshape(b, t, height // p, p, width // p, p, 3).permute(0, 1, 2, 4, 6, 3, 5)
        # The convolution as a matrix product: cuDNN would compute it in TF32.
        x = functional.linear(x.flatten(4).flatten(1, 3), proj.weight.flatten(1), proj.bias)
        x = x + clip_codes(self.config, t, height // p, x.device).to(x.dtype)
        outputs = []
        for block in self.blocks:
            x = block(x, mask)
            outputs = [*outputs, x][-taps:] if taps else outputs
        return self.norm(torch.stack(outputs) if taps else x)


class VisionEncoder(nn.Module):
    """The encoder, stage 1's heads (Linear and LayerNorm of each), and the norm before W_v."""

    def __init__(self, c, heads, projection):
        super().__init__()

        def head():
            norm = nn.LayerNorm(projection, eps=VISION_EPSILON)
            return nn.ModuleDict({"head": nn.Linear(c["width"], projection), "norm": norm})

        self.encoder = Encoder(c)
        self.clip_decoder = nn.ModuleList(head() for _ in range(heads))
        self.pool_norm = nn.LayerNorm(c["width"], eps=VISION_EPSILON)


def position_codes(tokens, width, device=None):
    """UMT's fixed table: sin and cos of p * 10000^(-2 j / d), interleaved. float32 [tokens, d]."""
    frequency = 10000.0 ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float().to(device)


def clip_codes(c, frames, side, device=None):
    """The table for a clip of side x side patches: where the weights learned another
    (`position_frames`, `position_size` of the configuration's `vision`), that one, interpolated;
    an image has its first frame's. float32 [frames * side^2, d]."""
    first = c["position_frames"] if c["position_frames"] and frames > 1 else frames
    learned = c["position_size"] // c["patch"] if c["position_size"] else side
    table = position_codes(first * learned**2, c["width"])
    table = table.unflatten(0, (first, learned, learned)).permute(1, 2, 3, 0)
    if first != frames:
        table = functional.interpolate(table.flatten(0, 1), frames, mode="linear")
        table = table.unflatten(0, (learned, learned))
    table = table.permute(3, 2, 0, 1)  # [T, d, rows, columns]
    if learned != side:
        table = functional.interpolate(table, (side, side), mode="bicubic")
    return table.permute(0, 2, 3, 1).flatten(0, 2).to(device)


class SceneBlock(nn.Module):
    """Equation (5): crop tokens look at the tokens of their scene; pre-norm, with residual."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=VISION_EPSILON)
        self.scene_norm = nn.LayerNorm(width, eps=VISION_EPSILON)
        self.attention = QueryKeyValue(width, width, heads)
        self.attention.out = nn.Linear(width, width)

    def forward(self, crops, scene):
        """crops [n, l, d], scene [V, d] of the one clip that they are of -> [n, l, d]."""
        context = self.scene_norm(scene)[None].expand(len(crops), -1, -1)
        return crops + self.attention.out(self.attention(self.norm(crops), context))


def masked_mean(tokens, mask):
    """tokens [n, l, d], mask bool [n, l] -> [n, d]; zeros where the mask names none."""
    total = torch.where(mask[..., None], tokens, 0).sum(1)
    return total / mask.sum(1).clamp(min=1)[:, None].to(total.dtype)


def hold_still(boxes, present):
    """The box of the middle frame in which the instance is present, held for all frames."""
    count = present.sum(1, keepdim=True)
    middle = (present.cumsum(1) >= (count + 1) // 2).int().argmax(1)
    box = boxes[torch.arange(len(boxes), device=boxes.device), middle]
    return box[:, None].expand_as(boxes), (count > 0).expand_as(present)


def enlarge(boxes, factor):
    """Boxes [..., 4] `factor` times as wide and high about their centres."""
    centre, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    return torch.cat([centre - half * factor, centre + half * factor], dim=-1)


def size_features(boxes):
    """Waves of the logarithm of width and height: [n, T, 4] -> [n, T, 4 OCTAVES]."""
    return _waves((boxes[..., 2:] - boxes[..., :2]).clamp(1 / 64, 1).log2() / 6)


def motion_features(boxes, present):
    """Waves of how far a box has moved since the instance appeared: [n, T, 4 OCTAVES]."""
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    first = present.int().argmax(1)
    return _waves(centre - centre[torch.arange(len(centre)), first][:, None])


def _waves(x):
    angle = x[..., None] * (torch.pi * 2.0 ** torch.arange(OCTAVES, device=x.device))
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def scene_codes(c, boxes, crop_side, scene_side):
    """The scene's position code at every crop patch's centre, bilinear: [n, T * crop_side^2, d]."""
    t = boxes.shape[1]
    table = clip_codes(c, t, scene_side, boxes.device).unflatten(0, (t, scene_side, scene_side))
    place = (torch.arange(crop_side, device=boxes.device) + 0.5) / crop_side

    def weights(low, high):
        centre = low[..., None] + place * (high - low)[..., None]
        centre = (centre * scene_side - 0.5).clamp(0, scene_side - 1)
        grid = torch.arange(scene_side, device=boxes.device)
        return (1 - (centre[..., None] - grid).abs()).clamp(min=0)

    rows, columns = weights(boxes[..., 1], boxes[..., 3]), weights(boxes[..., 0], boxes[..., 2])
    codes = torch.einsum("ntir,trcd->nticd", rows, table)
    return torch.einsum("ntjc,nticd->ntijd", columns, codes).flatten(1, 3)


class AddNorm(nn.Module):
    def __init__(self, inner, width):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=TEXT_EPSILON)

    def forward(self, x, residual):
        return self.LayerNorm(residual + self.dense(x))


class BertAttention(nn.Module):
    def __init__(self, width, context_width, heads):
        super().__init__()
        self.self = QueryKeyValue(width, context_width, heads)
        self.output = AddNorm(width, width)

    def forward(self, x, context, mask):
        return self.output(self.self(x, context, mask), x)


class BertLayer(nn.Module):
    def __init__(self, c, vision_width=None):
        super().__init__()
        width, hidden = c["width"], int(c["width"] * c["mlp_ratio"] + 1e-6)
        self.attention = BertAttention(width, width, c["heads"])
        if vision_width is not None:
            self.crossattention = BertAttention(width, vision_width, c["heads"])
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = AddNorm(hidden, width)

    def forward(self, x, mask, visual=None, visual_mask=None):
        x = self.attention(x, x, mask)
        if visual is not None:
            x = self.crossattention(x, visual, visual_mask)
        return self.output(functional.gelu(self.intermediate["dense"](x)), x)


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.word_embeddings = nn.Embedding(c["vocab_size"], c["width"])
        self.position_embeddings = nn.Embedding(c["max_length"], c["width"])
        self.token_type_embeddings = nn.Embedding(2, c["width"])
        self.LayerNorm = nn.LayerNorm(c["width"], eps=TEXT_EPSILON)

    def forward(self, ids):
        x = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        return self.LayerNorm(x + self.token_type_embeddings.weight[0])


class Bert(nn.Module):
    def __init__(self, c, vision_width):
        super().__init__()
        self.text_layers = first = c["depth"] - c["fusion_layers"]
        self.embeddings = Embeddings(c)
        layers = [BertLayer(c, None if i < first else vision_width) for i in range(c["depth"])]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def encode(self, ids):
        """int64 [B, s], [CLS] first, padded with 0 -> [B, s, d] of the last text layer."""
        x = self.embeddings(ids)
        for layer in self.encoder["layer"][: self.text_layers]:
            x = layer(x, ids != PAD_ID)
        return x

    def fuse(self, tokens, mask, visual, visual_mask=None):
        """tokens [B, s, d], mask bool [B, s], visual [B, V, e] -> [B, s, d] after the fusion."""
        for layer in self.encoder["layer"][self.text_layers :]:
            tokens = layer(tokens, mask, visual, visual_mask)
        return tokens


class Predictions(nn.Module):
    """Masked-language head; its decoder is the word embeddings."""

    def __init__(self, width, vocab_size):
        super().__init__()
        norm = nn.LayerNorm(width, eps=TEXT_EPSILON)
        self.transform = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": norm})
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, tokens, words):
        x = functional.gelu(self.transform["dense"](tokens))
        return functional.linear(self.transform["LayerNorm"](x), words, self.bias)


class TextEncoder(nn.Module):
    def __init__(self, c, vision_width):
        super().__init__()
        self.bert = Bert(c, vision_width)
        self.cls = nn.ModuleDict({"predictions": Predictions(c["width"], c["vocab_size"])})

    def mlm_logits(self, tokens):
        """Fused tokens [B, s, d] -> [B, s, vocabulary]."""
        return self.cls["predictions"](tokens, self.bert.embeddings.word_embeddings.weight)


def umt_text(text):
    """As UMT's `pre_text` (multi_modality/dataset/utils.py) changes every caption."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


class Tokenizer:
    """Text to [CLS] ids [SEP] [PAD] ..., `length` of them; `kind` says what `path` holds."""

    def __init__(self, path, kind, length, text="plain"):
        self.path, self.kind, self.length = Path(path), kind, length
        self.clean = {"plain": str, "umt": umt_text}[text]

    @functools.cached_property
    def _words(self):
        """(text -> ids, [CLS], [SEP]); only now, since video alone needs neither library."""
        if self.kind == "sentencepiece":
            import sentencepiece

            model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
            return model.encode, model.piece_to_id("[CLS]"), model.piece_to_id("[SEP]")
        import tokenizers

        lines = self.path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        vocab = {line.rstrip("\r"): i for i, line in enumerate(lines)}
        model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
        model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        encode = functools.partial(model.encode, add_special_tokens=False)
        return lambda text: encode(text).ids, vocab["[CLS]"], vocab["[SEP]"]

    def __call__(self, texts):
        """B str -> int64 [B, s]."""
        encode, first, last = self._words
        out = torch.full((len(texts), self.length), PAD_ID)
        for row, text in zip(out, texts):
            text = self.clean(text.encode("utf-8", "replace").decode("utf-8"))
            ids = encode(text)[: self.length - 2]
            row[: len(ids) + 2] = torch.tensor([first, *ids, last])
        return out


def _tensor(values, device):
    # A copy of NumPy's: torch takes no read-only or mirrored arrays.
    values = np.array(values) if isinstance(values, np.ndarray) else values
    return torch.as_tensor(values, device=device)


def crop_and_resize(frames, boxes, size):
    """Cuts one box out of every frame, as Pillow's BILINEAR with `resize(box=...)`, antialiased.

    uint8 [T, H, W, 3], float32 [T, 4] in fractions, clamped to the picture -> float32
    [T, size, size, 3] in [0, 255].
    """
    height, width = frames.shape[1:3]
    boxes = boxes.float().clamp(0, 1)
    down = _resize_weights(boxes[:, 1], boxes[:, 3], height, size)
    across = _resize_weights(boxes[:, 0], boxes[:, 2], width, size)
    out = torch.einsum("thwc,txw->thxc", frames.float(), across)
    return torch.einsum("thxc,tyh->tyxc", out, down)


def _resize_weights(low, high, pixels, size):
    """Ends [T] of an interval as fractions of `pixels` -> weights [T, size, pixels]."""
    low, high = (low * pixels)[:, None, None], (high * pixels)[:, None, None]
    scale = (high - low) / size
    output = torch.arange(size, dtype=torch.float32, device=low.device)[:, None] + 0.5
    source = torch.arange(pixels, dtype=torch.float32, device=low.device) + 0.5
    distance = (source - (low + output * scale)).abs() / scale.clamp(min=1)
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


class InstAP(nn.Module):
    """The model of stage 2. Parameters float32; `.to(torch.bfloat16)` or a device as usual.

    Args:
      config: contents of an export's config.json.
      tokenizer: B str -> int64 [B, s]; None: texts are given as ids.
    """

    def __init__(self, config, tokenizer=None):
        super().__init__()
        vision, text, align = config["vision"], config["text"], config["align"]
        self.config, self.tokenizer = config, tokenizer
        self.vision_encoder = VisionEncoder(
            vision, config["distill"]["layers"], config["teacher"]["projection"]
        )
        self.text_encoder = TextEncoder(text, vision["width"])
        self.vision_proj = nn.Linear(vision["width"], align["projection"])
        self.text_proj = nn.Linear(text["width"], align["projection"])
        self.itm_head = nn.Linear(text["width"], 2)
        scalars = ["temp", "instance_temp"]
        if config["contrastive"]["loss"] == "sigmoid":
            scalars += ["contrastive_bias", "instance_contrastive_bias"]
        for name in scalars:
            setattr(self, name, nn.Parameter(torch.zeros(())))
        if codes := align["size_code"] + align["motion_code"]:
            projection = nn.Linear(4 * OCTAVES * codes, vision["width"])
            self.box_codes = nn.ModuleDict({"projection": projection})
        width, heads = vision["width"], align["cross_attention_heads"]
        blocks = [SceneBlock(width, heads) for _ in range(align["cross_attention_depth"])]
        self.cross_attention = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})

    @classmethod
    def from_pretrained(cls, path):
        """Opens an export directory, strictly: every key there and no other.

        Raises:
          FileNotFoundError, ValueError (not such an export), RuntimeError (keys that do not fit).
        """
        from safetensors.torch import load_file

        path = Path(path)
        config = json.loads((path / "config.json").read_text())
        if config.get("format") != FORMAT:
            raise ValueError(f"{path}/config.json is not an export of format {FORMAT!r}")
        words = dict(config["tokenizer"])
        tokenizer = Tokenizer(path / words.pop("file"), **words)
        with torch.device("meta"):  # no memory for values that are replaced at once
            model = cls(config, tokenizer)
        model.load_state_dict(load_file(path / "model.safetensors"), strict=True, assign=True)
        return model

    def encode_video(self, frames):
        """Whole clips (an image is a clip of one frame).

        Args:
          frames: uint8 [B, T, H, W, 3], or a list of B [T, H, W, 3] of any T and size.

        Returns:
          [B, p], l2-normalised.
        """
        nothing = self.temp.new_zeros(0, self.config["vision"]["width"])
        means = (tokens.mean(0, keepdim=True) for tokens in self.visual_tokens(frames))
        return self._embed(torch.cat([nothing, *means]))

    def encode_instances(self, frames, boxes, present=None):
        """Instances: their crops, after these have looked at their scenes.

        Args:
          frames: as in `encode_video`.
          boxes: B arrays [n, T, 4], x0 y0 x1 y1 as fractions of the picture.
          present: B arrays bool [n, T], frames in which the instance is in the picture, at least
            one of them; None: all.

        Returns:
          B tensors [n, p], l2-normalised.
        """
        return [self._embed(pooled) for pooled, _ in self._see_instances(frames, boxes, present)]

    def encode_text(self, texts):
        """B str, or ids int [B, s] -> [B, p], l2-normalised."""
        tokens = self.text_encoder.bert.encode(self.text_ids(texts))
        return functional.normalize(self.text_proj(tokens[:, 0]).float(), dim=-1, eps=1e-12)

    def match(self, frames, texts):
        """Probability, float32 [B], that clip i and text i belong together, by the fusion layers;
        clips as in `encode_video`, texts as in `encode_text`."""
        ids, visual = self.text_ids(texts), self.visual_tokens(frames)
        if len(ids) != len(visual):
            raise ValueError(f"{len(visual)} clips and {len(ids)} texts; match wants pairs")
        runs = itertools.groupby(zip(ids, visual), key=lambda pair: len(pair[1]))
        found = [self._match("vtm", *map(torch.stack, zip(*run))) for _, run in runs]
        return torch.cat(found) if found else torch.zeros(0, device=self.temp.device)

    def match_instances(self, frames, boxes, texts, present=None):
        """As `match`, for instances: `texts` are B lists of n str. Returns B tensors [n]."""
        for own, sentences in zip(boxes, texts, strict=True):
            if len(own) != len(sentences):
                raise ValueError(f"{len(own)} instances and {len(sentences)} texts")
        seen = self._see_instances(frames, boxes, present)
        return [
            self._match("inst_vtm", self.text_ids(sentences), crop[:, None])
            for (_, crop), sentences in zip(seen, texts)
        ]

    def visual_tokens(self, frames):
        """B tensors [V, d]: the encoder's tokens of whole clips."""
        size = self.config["vision"]["image_size"]
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=self.temp.device)
        clips = [self._clip(clip) for clip in frames]
        pixels = [crop_and_resize(clip, whole.expand(len(clip), 4), size) for clip in clips]
        tokens = []
        for _, run in itertools.groupby(pixels, key=len):  # neighbours of one T together
            tokens.extend(self.vision_encoder.encoder(self.normalise(torch.stack(list(run)))))
        return tokens

    def text_ids(self, texts):
        """Texts or ids -> int64 [B, s] on the model's device."""
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of texts, not one")
        if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
            texts = self.tokenizer(texts)
        return _tensor(texts, self.temp.device).long()

    def normalise(self, pixels):
        """[..., 3] in [0, 255] -> standardised, in the model's dtype."""
        c = self.config["preprocessing"]
        mean, deviation = (pixels.new_tensor(c[name]) for name in ("mean", "std"))
        return ((pixels / 255 - mean) / deviation).to(self.temp.dtype)

    def temperatures(self):
        """(tau of whole clips, tau of instances), within their range."""
        low, high = self.config["contrastive"]["temperature_range"]
        own = self.instance_temp if self.config["align"]["own_temperature"] else self.temp
        return self.temp.clamp(low, high), own.clamp(low, high)

    def _see_instances(self, frames, boxes, present):
        """Of every clip, (what is embedded [n, d], the crop's own mean token [n, d])."""
        if present is None:
            present = [np.ones(np.shape(b)[:2], bool) for b in boxes]
        scenes = self.visual_tokens(frames)
        seen = []
        for clip, b, here, scene in zip(frames, boxes, present, scenes, strict=True):
            clip = self._clip(clip)
            b, here = _tensor(b, clip.device).float(), _tensor(here, clip.device).bool()
            if b.shape[1:] != (len(clip), 4) or b.shape[:2] != here.shape:
                shapes = f"boxes {list(b.shape)}, present {list(here.shape)}"
                raise ValueError(f"{shapes}: must be [n, {len(clip)}, 4] and [n, {len(clip)}]")
            if not ((b > -1) & (b < 2)).all():
                raise ValueError("boxes must be fractions of the picture, not pixels, and finite")
            if not here.any(1).all():
                raise ValueError("an instance must be present in at least one frame")
            seen.append(self._see_crops(clip, b, here, scene))
        return seen

    def _see_crops(self, clip, boxes, present, scene):
        """Equations (5) and (6) for the instances of one clip."""
        align, vision = self.config["align"], self.config["vision"]
        size = align["crop_size"]
        if align["still_boxes"]:
            boxes, present = hold_still(boxes, present)
        shown = enlarge(boxes, align["crop_context"]).clamp(0, 1)
        if not len(boxes):
            return (scene.new_zeros(0, vision["width"]),) * 2
        crops = torch.stack([crop_and_resize(clip, b, size) for b in shown])
        side = size // vision["patch"]
        mask = present.repeat_interleave(side**2, dim=1)
        tokens = self.vision_encoder.encoder(self.normalise(crops), mask)
        crop = masked_mean(tokens, mask)
        if align["scene_anchor"]:
            scene_side = vision["image_size"] // vision["patch"]
            codes = scene_codes(vision, shown, side, scene_side)
            tokens = tokens + codes.to(tokens.dtype)
        features = [size_features(boxes)] * align["size_code"]
        features += [motion_features(boxes, present)] * align["motion_code"]
        if features:
            codes = self.box_codes["projection"](torch.cat(features, dim=-1).to(tokens.dtype))
            tokens = tokens + codes.repeat_interleave(side**2, dim=1)
        for block in self.cross_attention["blocks"] if align["cross_attention"] else ():
            tokens = block(tokens, scene)
        pooled = masked_mean(tokens, mask)
        return (pooled if align["instance_embedding"] == "contextual" else crop), crop

    def _embed(self, pooled):
        embedding = self.vision_proj(self.vision_encoder.pool_norm(pooled))
        return functional.normalize(embedding.float(), dim=-1, eps=1e-12)

    def _match(self, term, ids, visual):
        if term not in self.config["trained"]["terms"]:
            raise ValueError(f"the match head was not trained: the run had no term {term!r}")
        tokens = self.text_encoder.bert.encode(ids)
        fused = self.text_encoder.bert.fuse(tokens, ids != PAD_ID, visual)
        return self.itm_head(fused[:, 0]).float().softmax(-1)[:, 1]

    def _clip(self, frames):
        clip = _tensor(frames, self.temp.device)
        if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
            raise ValueError(f"a clip is uint8 [T, H, W, 3], not {clip.dtype} {list(clip.shape)}")
        return clip

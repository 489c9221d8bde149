"""The one complete default configuration. Stages and ablations edit it (`configs/*.py`).

Every key the library reads is declared here with its default, its unit and its source. Files under
`configs/` call `default()` and set what differs, so the diff that `instap train` records says
exactly what a run changed. Optional values are `placeholder(type)`, never a plain None, so that
they can be overridden from the command line.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default() -> ConfigDict:
    """Returns the complete default configuration, at the paper's stage-1 numbers where it has any.

    The field `stage` selects the objective: 'teacher' (a small CLIP, for when no CLIP weights are
    at hand), 'distill' (stage 1: masked video distillation), 'align' (stage 2:
    instance-aware alignment, and its baselines); and to fine-tune what these have
    learned, 'ground' (a sentence to its boxes) and 'classify' (a clip to its label).
    """
    c = ConfigDict()
    c.stage = "distill"
    c.seed = 0
    c.steps = 1000  # optimizer steps of the whole run
    c.stop_at = placeholder(int)  # stop after this step; the schedules still end at `steps`
    c.data = _data()
    c.tokenizer = _tokenizer()
    c.vision = _vision()
    c.teacher = _teacher()
    c.text = _text()
    c.distill = _distill()
    c.contrastive = _contrastive()
    c.align = _align()
    c.ground = _ground()
    c.classify = _classify()
    c.optimizer = _optimizer()
    c.mesh = _mesh()
    c.distributed = _distributed()
    c.compute = _compute()
    c.checkpoint = _checkpoint()
    c.guard = _guard()
    c.log = _log()
    c.evaluation = _evaluation()
    return c


def _data() -> ConfigDict:
    c = ConfigDict()
    # Corpora to mix: 'DIR:SPLIT=WEIGHT' separated by commas; DIR is what `instap pack` wrote,
    # WEIGHT (default 1) is relative to the other corpora of the same kind. Empty: none.
    c.videos = ""
    c.images = ""
    # Fraction of the steps that use an image batch when both kinds are given. Which step is which
    # depends on the step number alone.
    c.image_fraction = 0.5
    c.batch_size = 64  # samples per step, over all devices
    c.group_size = placeholder(int)  # samples per group b; unset: one group per data shard
    c.frames = 8  # T of a video clip; an image has 1
    # 'random': one random frame in each of T equal segments; 'uniform': the middle of each.
    c.sampling = "random"
    # Static canvas (height, width) in pixels. A stored frame is placed top left; one that is
    # larger is scaled down to fit, keeping its aspect.
    c.canvas = (256, 456)
    c.instances_per_sample = 4  # instance budget: n = ceil(b * this)
    # Caption sub-sampling: 'epoch': one sentence of each caption, the next one each
    # epoch. 'first': off (Table 5): every epoch the caption from its start, cut to the text length.
    c.caption_sampling = "epoch"
    c.workers = 4  # processes per host that read and decode; 0: in the main process
    c.prefetch = 4  # batches buffered per worker
    c.device_prefetch = 2  # batches already on the device
    c.max_fault_rate = 0.01  # a larger share of unreadable samples, since the start, stops it
    # Seconds after which reading one sample is given up: it is left out, its worker replaced.
    c.decode_timeout = 60.0
    c.shuffle = True
    # Device-side augmentation: area of the random view as a fraction of the picture, and its
    # aspect ratio (UMT: RandomResizedCrop(scale=(0.5, 1))); flip skips samples that name a side.
    c.view_area = (0.5, 1.0)
    c.view_aspect = (0.75, 1.3333)
    c.flip = True
    return c


def _tokenizer() -> ConfigDict:
    c = ConfigDict()
    # 'sentencepiece' (a .model file) or 'wordpiece' (a BERT vocab.txt).
    c.kind = "sentencepiece"
    c.path = placeholder(str)
    # What texts go through first: 'plain', nothing; 'umt', UMT's own clean-up (pre_text), without
    # which weights of UMT meet tokens that they never saw.
    c.text = "plain"
    c.length = 32  # tokens s, [CLS] and [SEP] included (UMT)
    # Ids of [CLS] and [MASK] (masked language modelling), checked against the file. Sentencepiece
    # of `instap tokenizer`: 2 and 4; BERT's vocab.txt: 101 and 103.
    c.cls_id = 2
    c.mask_id = 4
    return c


def _vision() -> ConfigDict:
    """The student: ViT-L/16, no class token, joint space-time attention, tubelet 1."""
    c = ConfigDict()
    c.width = 1024
    c.depth = 24
    c.heads = 16
    c.mlp_ratio = 4.0
    c.patch = 16
    c.image_size = 224
    c.drop_path = 0.2  # of the last layer, rising linearly from 0 (UMT)
    # Frames of a clip, and pixels a side, that the weights learned the fixed position table for.
    # Set: clips of other lengths interpolate it linearly in time (UMT: ckpt_num_frame), pictures
    # of other sizes bicubically (UMT: interpolate_pos_embed_online). Unset: the table is computed
    # for the length and size at hand, as in every configuration that UMT published.
    c.position_frames = placeholder(int)
    c.position_size = placeholder(int)
    return c


def _teacher() -> ConfigDict:
    """The frozen teacher: CLIP ViT-L/14 at 196 px."""
    c = ConfigDict()
    # A workdir of a 'teacher' run, or what `instap convert --from=clip` wrote.
    c.checkpoint = placeholder(str)
    c.width = 1024
    c.depth = 24
    c.heads = 16
    c.mlp_ratio = 4.0
    c.patch = 14
    c.image_size = 196
    c.projection = 768
    return c


def _text() -> ConfigDict:
    """BERT-large."""
    c = ConfigDict()
    # What `instap convert --from=bert` wrote: where stage 'align' takes the text encoder from when
    # its workdir has no checkpoint yet.
    c.checkpoint = placeholder(str)
    c.vocab_size = 30522
    c.width = 1024
    c.depth = 24
    # Of `depth`, the last layers that also attend to visual tokens (UMT: large 5, base 3). A tower
    # of its own, as in stage 'teacher', has none: all its layers are text layers.
    c.fusion_layers = 5
    c.heads = 16
    c.mlp_ratio = 4.0
    c.max_length = 512
    c.dropout = 0.1
    return c


def _distill() -> ConfigDict:
    """Loss (1) and the attention-guided mask."""
    c = ConfigDict()
    c.layers = 6  # distilled layers: 6 (UMT) or 1 (the paper's single h)
    c.mask_ratio = 0.8  # rho: ceil(rho * L) tokens are masked
    # 'cls': the teacher's last-layer [CLS] attention row (UMT). 'received': column mean.
    # 'random': every token alike; the teacher is then not needed for the mask.
    c.mask_score = "cls"
    # 'sample': visible tokens drawn without replacement in proportion to the score (UMT).
    # 'topk': the ceil(rho * L) lowest scores are masked (the paper's text).
    c.mask_choice = "sample"
    return c


def _contrastive() -> ConfigDict:
    """Equation (2)."""
    c = ConfigDict()
    # 'softmax': InfoNCE (paper). 'sigmoid': of every pair by itself (SigLIP), in stage 'align'.
    c.loss = "softmax"
    c.bias = -10.0  # initial value, learnable, of 'sigmoid' (SigLIP)
    c.temperature = 0.07  # initial value, learnable; also of the instances' own
    c.temperature_range = (0.001, 0.5)
    return c


def _align() -> ConfigDict:
    """Equations (2)-(13). Stage 'align' also reads `distill` (layers and the mask's
    score and choice) and `contrastive`."""
    c = ConfigDict()
    # Weights of the terms in (11)-(13). A term of weight 0 is not computed.
    c.rec = 1.0  # loss (1) on the visible scene tokens (UMT: uta)
    c.vtc = 1.0  # (2)
    c.vtm = 1.0  # (3)
    c.mlm = 1.0  # (4)
    c.instance = 0.1  # lambda_inst; times the next three
    c.inst_vtc = 1.0  # (8)
    c.inst_vtm = 1.0  # (9)
    c.inst_mlm = 1.0  # (10)
    c.projection = 768  # d', of W_v and W_t (UMT: embed_dim)
    # Tokens of the scene that are masked, in a batch of videos and of images (UMT).
    c.mask_ratio_video = 0.8
    c.mask_ratio_image = 0.5
    c.mlm_ratio = 0.5  # of caption tokens, chosen for prediction (UMT)
    # The instances' temperature in (8) is a parameter of its own, or tau of (2) (Table 5).
    c.own_temperature = True
    # Weight, in the denominators of (8), of another instance of the same video (paper: 0).
    c.alpha = 0.0
    c.crop_size = placeholder(int)  # pixels, a multiple of the patch; unset: vision.image_size
    c.crop_mask_ratio = 0.0  # of crop tokens, drawn at random
    # Table 5: the box of the middle frame that shows the instance, held for all frames, instead of
    # its trajectory.
    c.still_boxes = False
    # (5): crop tokens look at their scene. False: instances are their crops alone.
    c.cross_attention = True
    c.cross_attention_depth = 1  # blocks
    c.cross_attention_heads = 16
    # Beyond the paper, each by itself. Crop tokens carry before (5): the scene's position code at
    # their patch centre and frame; learned codes of their box's size in the view, and of
    # how far it has moved since the instance appeared.
    c.scene_anchor = False
    c.size_code = False
    c.motion_code = False
    # Beyond the paper: crops of boxes enlarged this many times about their centre, to show the
    # surroundings; and the scale of the cross-attention's output projection at its start.
    c.crop_context = 1.0
    c.cross_attention_scale = 1.0
    # Instance sentences are further captions of their whole video in (2): without instance terms
    # the baseline UMT (g+i), beside them beyond the paper.
    c.global_instances = False
    return c


def _ground() -> ConfigDict:
    """Box regression (L1 + GIoU). The paper names no weights: these are DETR's."""
    c = ConfigDict()
    c.l1 = 5.0
    c.giou = 2.0
    return c


def _classify() -> ConfigDict:
    c = ConfigDict()
    # Names of the classes, in the order of the head's outputs; a sample's class is its key 'label'
    # (docs/annotations.md). configs/classify_l16.py reads them from a file.
    c.classes = ()
    c.smoothing = 0.1  # of the labels (UMT)
    # Linear probe: the head alone is trained, the encoder stays as it is.
    c.frozen = False
    return c


def _optimizer() -> ConfigDict:
    c = ConfigDict()
    c.learning_rate = 1.5e-4  # peak, for `reference_batch` samples a step
    c.reference_batch = placeholder(int)  # set: the peak scales with batch_size / this
    c.min_learning_rate = 1e-5  # of the cosine's end, same scaling (UMT stage 1)
    c.warmup_steps = 50
    c.betas = (0.9, 0.95)
    c.epsilon = 1e-8
    c.weight_decay = 0.05  # not on biases, norms, position tables and temperatures
    c.layer_decay = 1.0  # the k-th block from the top learns at rate * this ** k
    c.clip_norm = placeholder(float)  # global gradient norm; unset: no clipping
    # Parts in which a step's one batch is computed, one after another, and whose gradients are
    # averaged: it saves memory. Each contrast sees the samples of its part alone.
    c.accumulate = 1
    return c


def _mesh() -> ConfigDict:
    """Device mesh. -1 in at most one place: whatever is left."""
    c = ConfigDict()
    c.slices = 1  # TPU slices, joined by the data-center network, that `replica` is divided among
    c.replica = 1  # pure data parallelism (between slices): a multiple of `slices`
    c.fsdp = -1  # data parallelism with sharded parameters and optimizer state
    c.tensor = 1  # heads and MLP hidden units
    return c


def _distributed() -> ConfigDict:
    """Several processes, one a host (docs/pods.md). Seconds; JAX's defaults where it has any."""
    c = ConfigDict()
    c.initialization_timeout = 300  # for all processes to have started
    c.heartbeat_timeout = 100  # a host that was not heard of for so long is dead: the others end
    # A start or a step that takes longer (compiling, validation and saving included) waits for
    # something that hangs: the process says where it is and ends. Also of a single process.
    c.step_timeout = 3600
    return c


def _compute() -> ConfigDict:
    c = ConfigDict()
    c.dtype = "bfloat16"  # of activations and matmuls; parameters, norms, softmax, loss: float32
    # A TPU's matmuls of 'float32' round their factors to bfloat16, as JAX has it unless
    # JAX_DEFAULT_MATMUL_PRECISION=highest is set.
    # What the backward pass keeps of a block: 'none' (only its input), 'attention' (also what
    # the TPU's kernel put out), 'offload' (these two in the host's memory, where they are large),
    # 'dots' (as 'attention', and matmul outputs without batch dimensions), 'all'
    # (docs/attention.md).
    c.remat = "none"
    # What computes attention: 'xla', our TPU kernel 'pallas', the GPU's 'cudnn', or by the mesh's
    # platform and the length, 'auto' (docs/attention.md).
    c.attention = "auto"
    # Frames of instance crops that a device encodes at a time, at most (whole crops, one at least),
    # to bound memory: the work and the batch stay the same, weights are gathered more often.
    # Unset: all of a step at once.
    c.crop_frames = placeholder(int)
    # Where compiled programs are kept for later starts; storage that all hosts share is best.
    # Unset: what JAX_COMPILATION_CACHE_DIR says, else WORKDIR/xla_cache, but on CPUs nowhere.
    c.cache_dir = placeholder(str)
    return c


def _checkpoint() -> ConfigDict:
    c = ConfigDict()
    c.every = 1000  # steps
    c.keep = 3
    # Initial parameters from another run's workdir when this workdir has no checkpoint yet.
    c.init_from = placeholder(str)
    c.init_which = "newest"  # of that run's checkpoints: 'newest' or 'best' (by `evaluation`)
    # Failures to write one, in a row, that a run of a single process bears, and the seconds until
    # it tries again: doubled after each.
    c.retries = 3
    c.retry_seconds = 5.0
    return c


def _guard() -> ConfigDict:
    """What happens to numbers that cannot be right (docs/reliability.md)."""
    c = ConfigDict()
    # An update whose loss, gradient or size is not finite is never applied. 'stop': the run ends
    # there, with a dump for `instap replay`. 'skip': it goes on without that update.
    c.non_finite = "stop"
    c.max_skipped = 10  # of a whole run; one more stops it as 'stop' does
    # A warning where loss > median + spike * MAD, both of the last `spike_window` losses of the
    # same kind of batch; 0: none.
    c.spike = 20.0
    c.spike_window = 100  # steps
    c.spike_stop = False  # stop there
    return c


def _log() -> ConfigDict:
    c = ConfigDict()
    c.every = 20  # steps between lines of metrics.jsonl
    c.tensorboard = True
    c.wandb_project = placeholder(str)  # needs the extra [wandb]
    c.profile = placeholder(str)  # 'A:B': steps to trace for XProf, into WORKDIR/profile
    return c


def _evaluation() -> ConfigDict:
    """Retrieval during training on validation splits, and the best checkpoint by it. Off unless
    `every` is set. Test suites are refused: a checkpoint chosen on one is not measured by it."""
    c = ConfigDict()
    c.every = placeholder(int)  # steps
    c.videos = ""  # 'DIR:SPLIT' of packed data, separated by commas
    c.images = ""
    # SPLIT/global or SPLIT/instance, then mean_recall or as t2v/R@1: more is better; the
    # checkpoint with the most is kept in `checkpoints-best`. Unset: none is kept.
    c.metric = placeholder(str)
    c.frames = placeholder(int)  # T of a clip; unset: data.frames
    c.batch_size = 32  # samples a step; rounded up to a multiple of the data shards
    return c


def needs_teacher(config: ConfigDict) -> bool:
    """Whether the stage reads the frozen teacher: for features to predict, or for its attention."""
    if config.stage != "align":
        return config.stage == "distill"
    masked = max(config.align.mask_ratio_video, config.align.mask_ratio_image) > 0
    return config.align.rec > 0 or (masked and config.distill.mask_score != "random")

"""Every key, its default and one line about it. A config is this file plus a few changed keys.

A choice and its options are siblings: `model.moe.router = "top_k"` picks the block
`model.moe.routers.top_k`. Only the chosen block travels on; changing a key of a block that is not
chosen is an error, because it would do nothing. The bounds of every number are in
moe_jax/config/bounds.py.
"""

from ml_collections import ConfigDict


def defaults() -> ConfigDict:
    """Returns a new tree of all defaults."""
    c = ConfigDict()
    c.seed = 0  # parameters, data order, dropout
    c.simulate_devices = (
        0  # CPU devices to simulate in this process; 0 = the devices that are there
    )
    # a few steps of everything, to see that it works: what --smoke sets (moe_jax/config/smoke.py)
    c.smoke = False
    c.profile = ""  # "10:13" writes a profiler trace of steps 10, 11 and 12
    c.mesh = mesh()
    c.task = "lm"  # what is learned: moe_jax/tasks
    c.tasks = tasks()
    c.model = model()
    c.optim = optim()
    c.train = train()
    c.data = data()
    c.eval = ConfigDict()
    c.eval.every = 100  # steps between evaluations; 0 = only at the end
    c.eval.batches = 0  # held-out batches of each evaluation on the way; 0 = all of them
    c.eval.final_batches = 0  # held-out batches of the evaluation at the end; 0 = all of them
    c.eval.batch_size = 0  # rows of an evaluation batch; 0 = train.batch_size
    c.eval.dispatcher = (
        "same"  # "same" as in training, or the name of another dispatcher ("dropless")
    )
    c.eval.sample_tokens = 200  # tokens of the sample printed at each evaluation; 0 = none
    c.eval.sample_prompt = ""  # what the sample begins with
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps between checkpoints; 0 = only at the end
    c.checkpoint.keep = 2  # the last n are kept
    c.checkpoint.keep_best = 1  # and the best n by held-out loss
    c.log = ConfigDict()
    # steps between rows of metrics.jsonl; such a step holds a second copy of the parameters, for
    # the update norm
    c.log.every = 10
    c.log.tensorboard = True  # also write TensorBoard events
    c.log.histogram_every = (
        100  # steps between rows of the picture of the experts' load (TensorBoard, 4_experts)
    )
    # steps between gradients of language and auxiliary losses compared (3 backward passes); 0 = off
    c.log.interference_every = 0
    c.record = ConfigDict()
    # steps whose routing is written, token by token, to workdir/routing: "100,200", "every 50"
    c.record.steps = ""
    c.record.rows = 0  # the first n rows of the batch; 0 = all
    return c.lock()


def mesh() -> ConfigDict:
    c = ConfigDict()
    c.data = -1  # data parallel and FSDP; -1 = the devices that the other axes leave
    c.expert = 1  # expert parallel (also shards the batch)
    c.model = 1  # tensor parallel: heads, hidden columns, vocabulary
    return c


def tasks() -> ConfigDict:
    c = ConfigDict()
    c.lm = ConfigDict()  # its data: data.sources
    c.classification = ConfigDict()
    c.classification.dataset = "vader"  # moe_jax/tasks/classification/data.py, or "tfds:NAME"
    c.classification.tokens = (
        "bpe:8192"  # tokenizer: "bytes", or "bpe:N", trained on the training texts
    )
    # True: to choose settings. The test part is left out; one training text in data.heldout_every
    # is held out instead.
    c.classification.select = False
    c.translation = ConfigDict()
    c.translation.dataset = "bible_en_es"  # moe_jax/tasks/translation/data.py, or "tfds:NAME"
    c.translation.vocab_size = 8192  # of the tokenizer, trained on both sides of the training pairs
    c.translation_prefix = (
        ConfigDict()
    )  # the same with a decoder alone, which has the source as prefix
    c.translation_prefix.dataset = "bible_en_es"
    c.translation_prefix.vocab_size = 8192
    c.vision = ConfigDict()
    c.vision.dataset = "digits"  # moe_jax/tasks/vision/data.py, or "tfds:NAME"
    c.vision.patch = 2  # pixels of a side of a patch; data.seq_len is the number of patches
    c.vision.copies = (
        1  # of each training image: the first as it is, the others shifted and flipped
    )
    c.vision.shift = 1  # pixels, at most
    c.vision.flip = False  # mirrors half of the copies
    c.recommendation = ConfigDict()
    c.recommendation.dataset = (
        "debian_depends"  # moe_jax/tasks/recommendation/data.py, or "tfds:NAME"
    )
    c.recommendation.min_items = 5  # of a user
    c.recommendation.min_users = 10  # of an item
    c.speech = ConfigDict()
    c.speech.dataset = "fsdd"  # moe_jax/tasks/speech/data.py
    c.speech.mel_bins = 40
    c.speech.stack = 4  # frames of 10 ms in one vector
    # of each training recording: the first as it is, the others changed in tempo and with noise
    c.speech.copies = 1
    c.speech.tempo = 0.1  # change of length, at most
    c.speech.noise = 0.05  # of the root mean square, at most
    return c


def model() -> ConfigDict:
    c = ConfigDict()
    c.kind = "decoder"  # which model: moe_jax/models
    c.kinds = kinds()
    c.vocab_size = 256  # rows of the embedding; at least the tokenizer's
    c.d_model = 128  # width of the residual stream
    c.num_heads = 4
    c.num_kv_heads = 4  # fewer than num_heads = grouped-query attention
    c.head_dim = 0  # 0 = d_model / num_heads
    c.qk_norm = False  # RMSNorm of queries and keys (Henry et al. 2020, arXiv:2010.04245)
    c.attention_bias = False  # biases of the query, key and value projections
    c.rope_theta = 10_000.0  # base of the rotary frequencies (Su et al. 2021, arXiv:2104.09864)
    c.norm_epsilon = 1e-6
    c.ffn_hidden = 512  # hidden width of a dense block
    c.activation = "swiglu"  # "swiglu" or "gelu", dense and expert
    c.tie_embeddings = False  # the head is the embedding's transpose
    c.dropout = 0.0  # of the embedding and of each residual branch
    # blocks before the period: a tuple of "dense", "moe", and "depth:dense", "depth:moe" (mixture
    # of depths)
    c.prefix = ()
    c.period = ("moe",)  # blocks repeated `repeats` times
    c.repeats = 4
    c.suffix = ()  # blocks after the last period
    c.scan = False  # the repeats as one lax.scan over stacked parameters
    c.remat = (
        "none"  # "none", "full", "dots", "dispatch": what the backward pass recomputes of a block
    )
    # True: train a causal model although later tokens or other sequences change its outputs
    # (moe/causality.py)
    c.allow_leak = False
    # of the parameters; moments and averages have at least float32 (docs/precision.md)
    c.param_dtype = "float32"
    c.dtype = "float32"  # of the computation; the router uses at least float32
    c.depth = ConfigDict()
    c.depth.capacity = (
        0.125  # fraction of a sequence's tokens that train a depth block (models/depth.py)
    )
    # coefficient of the loss that trains the causal rule, by which they evaluate and decode
    c.depth.loss = 0.1
    c.moe = moe()
    return c


def kinds() -> ConfigDict:
    c = ConfigDict()
    c.decoder = ConfigDict()
    c.decoder.bidirectional_prefix = (
        False  # a row's prefix (the source of a translation) sees all of itself
    )
    c.encoder = ConfigDict()
    c.encoder.inputs = "tokens"  # or "vectors": patches of an image, frames of speech
    c.encoder.input_dim = 1  # width of a vector
    c.encoder.num_classes = 2
    c.encoder.pool = "mean"  # over what is not padding: "sum", "mean", "max", "first"
    c.encoder.attention = (
        "full"  # to the whole segment, or "causal", as the language model that it begins from
    )
    # rows of a learned table of positions, at least data.seq_len; 0 = rotary embeddings alone
    c.encoder.learned_positions = 0
    c.encoder.head_dropout = 0.0  # of the pooled row
    c.encoder.token_dropout = (
        0.0  # of whole places of the input (Iyyer et al. 2015, deep averaging networks)
    )
    c.encdec = ConfigDict()  # the decoder's blocks are model.prefix, period, repeats and suffix
    c.encdec.encoder_prefix = ()
    c.encdec.encoder_period = ("moe",)
    c.encdec.encoder_repeats = 4
    c.encdec.encoder_suffix = ()
    c.mmoe = ConfigDict()
    c.mmoe.items = (
        1,
    )  # items of each task: the first so many belong to task 0, the next to task 1, and so on
    c.mmoe.item_dropout = 0.0  # of a row's input features, in training
    c.article = ConfigDict()
    c.article.num_experts = 64
    c.article.window = 16  # input places that an expert weighs: the last tokens, or the whole row
    c.article.aggregate = "sum"  # of the experts: "sum", "mean", "gated"
    c.article.activation = "gelu"  # of an expert: "identity", "relu", "gelu"
    c.article.num_classes = 0  # 0 = the next token
    return c


def moe() -> ConfigDict:
    c = ConfigDict()
    c.num_experts = 8
    c.expert_hidden = 256  # hidden width of one expert
    c.shared_experts = 0  # always-on experts of width expert_hidden, added to the routed ones
    c.group_rows = 1  # rows (sequences) that share expert capacity and ordering
    c.router = "top_k"
    c.routers = routers()
    c.ordering = "token_major"  # which assignment wins when an expert is full
    c.orderings = ConfigDict()
    c.orderings.token_major = ConfigDict()
    c.orderings.k_major = ConfigDict()
    c.orderings.batch_priority = ConfigDict()
    c.orderings.rounding = ConfigDict()
    c.orderings.rounding.tile = (
        16  # an expert's assignments of a group are rounded to a multiple of this, in training
    )
    c.dispatcher = "dropless"
    c.dispatchers = ConfigDict()
    c.dispatchers.dropless = ConfigDict()
    c.dispatchers.dropless.buffer = (
        0.0  # rows held at once, as a factor of the balanced load; 0 = the worst case in one round
    )
    c.dispatchers.capacity = ConfigDict()
    # An expert takes ceil(factor * k * tokens / num_experts) of each group; for null experts k is
    # the intended number of real ones.
    c.dispatchers.capacity.factor = 1.25
    c.dispatchers.slots = ConfigDict()  # for the router soft alone
    c.losses = ConfigDict()
    # coefficient of Switch's load-balancing loss over the global batch; all of these:
    # docs/balance.md
    c.losses.balance = 0.01
    c.losses.gshard = 0.0  # of GShard's loss (first choices, 1 / experts^2 when balanced)
    c.losses.sequence_balance = 0.0  # of DeepSeek-V3's sequence-wise loss
    c.losses.micro_batch_balance = (
        0.0  # of Switch's loss of each micro-batch, averaged over micro-batches
    )
    c.losses.importance = 0.0  # of Shazeer's importance loss (CV^2 of the sums of gates)
    c.losses.load = 0.0  # of Shazeer's load loss (CV^2 of the smooth load); router noisy_top_k only
    c.losses.z = 0.001  # of the router z-loss (ST-MoE)
    c.adaptive = ConfigDict()
    # > 0: the weight of the balance losses grows by this factor a step while more drops than
    # target_drop; 0 = off
    c.adaptive.rate = 0.0
    c.adaptive.target_drop = 0.01  # fraction of assignments
    c.adaptive.limit = 100.0  # the weight stays within [1 / limit, limit]
    c.sparse = sparse()
    return c


def sparse() -> ConfigDict:
    """Zeros inside the experts' weights (docs/sparse_weights.md)."""
    c = ConfigDict()
    c.rule = "none"  # who decides which weights are zero; "none" = experts are dense
    c.rules = ConfigDict()
    c.rules.none = ConfigDict()
    c.rules.static = ConfigDict()  # the smallest first values, for ever
    c.rules.static.threshold = (
        0.0  # those below this magnitude; 0 = as many as the pattern's density leaves
    )
    c.rules.threshold = (
        ConfigDict()
    )  # whatever is below a magnitude after an update; it may come back
    # the magnitude; 0 = that which leaves the pattern's density of each expert's first values
    c.rules.threshold.threshold = 0.0
    c.rules.magnitude = ConfigDict()  # gradual pruning, from dense to the pattern's density
    c.rules.magnitude.begin = 0.0  # as a fraction of train.steps
    c.rules.magnitude.end = 0.5  # likewise: from here on the masks stay
    c.rules.magnitude.every = 20  # steps between changes of the masks
    c.rules.set = ConfigDict()  # SET: the smallest go, random ones come
    c.rules.set.fraction = 0.3  # of the living, replaced at each change
    c.rules.set.every = 50
    c.rules.set.end = 0.75  # as a fraction of train.steps
    c.rules.rigl = ConfigDict()  # RigL: the smallest go, those with the largest gradient come
    c.rules.rigl.fraction = 0.3  # at first; it falls to 0 as a cosine
    c.rules.rigl.every = 50
    c.rules.rigl.end = 0.75  # as a fraction of train.steps
    c.rules.group_lasso = ConfigDict()  # hidden units become zero by themselves; pattern units only
    c.rules.group_lasso.strength = 0.2  # lambda, beside the root mean square of a unit's weights
    c.pattern = "unstructured"  # what is zero together
    c.patterns = ConfigDict()
    c.patterns.unstructured = ConfigDict()
    c.patterns.unstructured.density = (
        0.25  # fraction of each expert's weights, of each matrix, that are not zero
    )
    c.patterns.n_m = ConfigDict()
    c.patterns.n_m.n = 2  # weights that are not zero ...
    c.patterns.n_m.m = 4  # ... of this many consecutive inputs
    c.patterns.blocks = ConfigDict()
    c.patterns.blocks.density = 0.25
    c.patterns.blocks.block = 16  # a block is block x block weights
    c.patterns.blocks.balanced = True  # as many blocks for every block of outputs
    c.patterns.units = ConfigDict()
    c.patterns.units.density = 0.25  # fraction of each expert's hidden units
    # How `convert compact` stored the experts of a model for inference: written by it, never by
    # hand.
    c.stored = ConfigDict(
        {"block": 0, "w_in": 0, "w_out": 0}
    )  # side of a block (0 = whole matrices), blocks of a column
    return c


def routers() -> ConfigDict:
    c = ConfigDict()
    c.top_k = ConfigDict()
    c.top_k.k = 2  # experts per token
    c.top_k.softmax = "before"  # "before" or "after" the selection
    c.top_k.renormalize = True  # gates of a token sum to 1 (softmax "after" always does)
    c.top_k.scale = 1.0  # factor on the gates
    c.switch = ConfigDict()
    c.switch.jitter = (
        0.01  # training multiplies the router's input by uniform(1 - jitter, 1 + jitter)
    )
    c.noisy_top_k = ConfigDict()
    c.noisy_top_k.k = 2
    c.noisy_top_k.min_noise = 0.01  # least standard deviation of the noise
    c.sigmoid = ConfigDict()  # DeepSeek-V3
    c.sigmoid.k = 2
    c.sigmoid.score = "sigmoid"  # affinities: "sigmoid", or "softmax" as in DeepSeek-V2
    c.sigmoid.renormalize = True  # gates of a token sum to scale
    c.sigmoid.scale = 1.0  # factor on the gates (routed scaling)
    c.sigmoid.bias_rate = 0.001  # how far a step moves an expert's bias towards balance; 0 = never
    c.sigmoid.num_groups = 1  # groups of consecutive experts
    c.sigmoid.top_groups = 1  # groups that a token may choose from; num_groups = all
    c.sigmoid.group_score = (
        "top2"  # of a group: sum of its two largest affinities, or "max", the largest
    )
    c.quantile = ConfigDict()
    c.quantile.k = 2
    c.quantile.score = "sigmoid"  # or "softmax"
    c.quantile.renormalize = True
    c.quantile.scale = 1.0
    c.quantile.bins = 256  # of each expert's histogram, from which the quantile is interpolated
    c.quantile.ema = 0.0  # share of the old bias that a step keeps
    c.cosine = ConfigDict()  # X-MoE
    c.cosine.k = 2
    c.cosine.renormalize = True
    c.cosine.dim = 0  # of the hypersphere; 0 = num_experts / 2, at least 2
    c.cosine.temperature = 0.3  # first value; learned
    c.cosine.min_temperature = 0.01  # it acts at least as high
    c.multi_gate = ConfigDict()  # MMoE
    c.multi_gate.k = 2  # num_experts = the paper's dense mixture
    c.multi_gate.num_gates = 2  # one for each task of the model mmoe
    c.multi_gate.renormalize = True  # gates of a token sum to 1
    c.null = ConfigDict()
    c.null.k = 4  # choices per token, real or null
    c.null.num_null = 8  # null experts, which compute nothing
    c.null.kind = "zero"  # a null choice adds "zero", or a "copy" of the token
    c.null.renormalize = (
        "all"  # gates divided by the sum of all choices, of the "real" ones, or "none"
    )
    c.uniform = ConfigDict()  # baseline: experts in turn by position
    c.uniform.k = 2
    c.random = ConfigDict()  # baseline: experts by a hash of layer, position and token id
    c.random.k = 2
    c.random.seed = 0
    c.hash = ConfigDict()  # experts by a fixed random table of token ids
    c.hash.k = 1
    c.hash.seed = 0
    c.base = ConfigDict()  # BASE / Sinkhorn: balanced in training, greedy at evaluation
    c.base.k = 1
    c.base.iterations = 10  # of Sinkhorn
    c.base.scope = (
        "group"  # what is balanced: each "group", or the whole "batch" (not with micro-batches)
    )
    c.base.gates = "sigmoid"  # of the chosen scores (BASE), or "softmax" (S-BASE)
    c.relu = ConfigDict()  # ReMoE; set the balance losses and z to 0
    c.relu.k = (
        2  # active experts per token on average, to which the adaptive L1 loss brings them down
    )
    c.relu.max_active = 4  # served experts of one token at most; the others are dropped
    c.relu.l1 = 1e-8  # first coefficient of the L1 loss
    c.relu.alpha = 1.2  # factor by which a step changes the coefficient
    c.relu.balanced = True  # the L1 loss weighs an expert by its load
    c.expert_choice = ConfigDict()
    # experts per token on average: each takes ceil(factor * tokens / num_experts) of a group
    c.expert_choice.factor = 2.0
    c.soft = ConfigDict()  # soft MoE; dispatcher "slots" only
    # of each expert in each group; about tokens of a group / num_experts costs what k = 1 does
    c.soft.slots = 4
    c.soft.normalize = True  # unit vectors and a learned scale in the slots' scores
    c.recorded = ConfigDict()  # replay of a recording, for instruments
    c.recorded.k = 2  # choices per token in the recording
    c.recorded.average = (
        0.0  # experts per token when the load is as intended, where that is fewer; 0 = k
    )
    c.recorded.gates = (
        "recorded"  # or "router": softmax of the present router over the recorded experts
    )
    return c


def optim() -> ConfigDict:
    c = ConfigDict()
    c.learning_rate = 3e-3  # peak
    c.warmup_steps = 20  # linear, from 0; fewer in a run that is too short for them, which says so
    c.clip_norm = 1.0  # global gradient norm; 0 = off
    c.decay_mask = "matrices"  # what weight decay applies to: "matrices", "all", "none"
    # regular expression: only parameters in whose names it is found move ("^ends/head":
    # docs/tasks.md); "" = all
    c.train_only = ""
    # of parameters in bfloat16, one in float32 beside them, which small updates add up in
    # (docs/precision.md)
    c.master_copy = False
    c.ema_decay = 0.0  # exponential moving average of the parameters, used by evaluation; 0 = off
    c.optimizer = "adamw"
    c.optimizers = ConfigDict()
    c.optimizers.adamw = ConfigDict({"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1})
    c.optimizers.lion = ConfigDict({"b1": 0.9, "b2": 0.99, "weight_decay": 0.1})
    c.optimizers.adafactor = ConfigDict({"decay_rate": 0.8, "weight_decay": 0.0})
    c.optimizers.muon = ConfigDict(
        {"beta": 0.95, "ns_steps": 5, "weight_decay": 0.1, "adam_learning_rate": 1.0}
    )
    c.optimizers.sgd = ConfigDict({"momentum": 0.9, "nesterov": False, "weight_decay": 0.0})
    c.schedule = "cosine"
    c.schedules = ConfigDict()
    c.schedules.cosine = ConfigDict({"final_fraction": 0.1})
    c.schedules.wsd = ConfigDict({"decay_fraction": 0.2, "final_fraction": 0.0, "shape": "linear"})
    c.schedules.linear = ConfigDict({"final_fraction": 0.0})
    c.schedules.constant = ConfigDict()
    return c


def train() -> ConfigDict:
    c = ConfigDict()
    c.steps = 1000
    c.batch_size = 16  # rows (sequences) of an optimizer step, over all devices and micro-batches
    # rows of a micro-batch; smaller than batch_size = exact gradient accumulation; 0 = batch_size
    c.micro_batch_size = 0
    c.nonfinite_patience = (
        0  # steps in a row with a non-finite loss or gradient that are skipped before the run stops
    )
    c.init_from = ""  # workdir of another run whose parameters this one starts from
    # Pairs of a prefix of those parameters' names and a new one, as in (("repeats/0",
    # "prefix/0"),); ("head", "") leaves head out.
    c.init_rename = ()
    c.stop_at = 0  # end after this step although train.steps (and the schedule) go further; 0 = off
    return c


def data() -> ConfigDict:
    c = ConfigDict()
    c.sources = (
        ("embedded", 1.0),
    )  # (source, weight): "embedded", "embedded:drama,verse" or a prepared directory
    c.seq_len = 256  # tokens of a row
    c.slice_bytes = 0  # training bytes of each embedded domain, as whole documents; 0 = all
    c.heldout_bytes = 0  # held-out bytes of each embedded domain, likewise
    c.heldout_every = 20  # every n-th document of a domain is held out
    c.folder = (
        "data"  # where files of data that the package does not have lie; not for data.sources
    )
    c.prefetch = 4  # batches read ahead
    return c

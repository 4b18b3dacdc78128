"""Every key, its default and one line about it. A config is this file plus a few changed keys.

A choice and its options are siblings: `model.moe.router = "top_k"` picks the block `model.moe.routers.top_k`. Only the chosen block
travels on; changing a key of a block that is not chosen is an error, because it would do nothing.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    del arg
    c = ConfigDict()
    c.seed = 0  # parameters, data order, dropout
    c.simulate_devices = 0  # CPU devices to simulate in this process; 0 = the devices that are there
    c.profile = ""  # "10:13" writes a profiler trace of steps 10, 11 and 12
    c.mesh = mesh()
    c.model = model()
    c.optim = optim()
    c.train = train()
    c.data = data()
    c.eval = ConfigDict()
    c.eval.every = 100  # steps between evaluations; 0 = only at the end
    c.eval.batches = 0  # held-out batches of each evaluation on the way; 0 = all of them
    c.eval.final_batches = 0  # held-out batches of the evaluation at the end; 0 = all of them
    c.eval.batch_size = 0  # rows of an evaluation batch; 0 = train.batch_size
    c.eval.dispatcher = "same"  # "same" as in training, or the name of another dispatcher ("dropless")
    c.eval.sample_tokens = 200  # tokens of the sample printed at each evaluation; 0 = none
    c.eval.sample_prompt = ""  # what the sample begins with
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps between checkpoints; 0 = only at the end
    c.checkpoint.keep = 2  # the last n are kept
    c.checkpoint.keep_best = 1  # and the best n by held-out loss
    c.log = ConfigDict()
    c.log.every = 10  # steps between rows of metrics.jsonl; such a step holds a second copy of the parameters, for the update norm
    c.log.tensorboard = True  # also write TensorBoard events
    c.log.histogram_every = 100  # steps between expert-load histograms
    return c.lock()


def mesh() -> ConfigDict:
    c = ConfigDict()
    c.data = -1  # data parallel and FSDP; -1 = the devices that the other axes leave
    c.expert = 1  # expert parallel (also shards the batch)
    c.model = 1  # tensor parallel: heads, hidden columns, vocabulary
    return c


def model() -> ConfigDict:
    c = ConfigDict()
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
    c.prefix = ()  # blocks before the period: a tuple of "dense" and "moe"
    c.period = ("moe",)  # blocks repeated `repeats` times
    c.repeats = 4
    c.suffix = ()  # blocks after the last period
    c.scan = False  # the repeats as one lax.scan over stacked parameters
    c.remat = "none"  # "none", "full", "dots", "dispatch": what the backward pass recomputes of a block
    c.allow_leak = False  # True: train a causal model although later tokens or other sequences change its outputs (moe/causality.py)
    c.param_dtype = "float32"
    c.dtype = "float32"  # of the computation; the router uses at least float32
    c.moe = moe()
    return c


def moe() -> ConfigDict:
    c = ConfigDict()
    c.num_experts = 8
    c.expert_hidden = 256  # hidden width of one expert
    c.shared_experts = 0  # always-on experts of width expert_hidden, added to the routed ones
    c.group_rows = 1  # rows (sequences) that share expert capacity and ordering
    c.router = "top_k"
    c.routers = ConfigDict()
    c.routers.top_k = ConfigDict()
    c.routers.top_k.k = 2  # experts per token
    c.routers.top_k.softmax = "before"  # "before" or "after" the selection
    c.routers.top_k.renormalize = True  # gates of a token sum to 1 (softmax "after" always does)
    c.routers.top_k.scale = 1.0  # factor on the gates
    c.ordering = "token_major"  # which assignment wins when an expert is full
    c.orderings = ConfigDict()
    c.orderings.token_major = ConfigDict()
    c.dispatcher = "dropless"
    c.dispatchers = ConfigDict()
    c.dispatchers.dropless = ConfigDict()
    c.dispatchers.dropless.buffer = (
        0.0  # rows held at once, as a factor of the balanced load; 0 = the worst case in one round
    )
    c.dispatchers.capacity = ConfigDict()
    c.dispatchers.capacity.factor = 1.25  # an expert takes ceil(factor * k * tokens / num_experts) of each group
    c.losses = ConfigDict()
    c.losses.balance = 0.01  # coefficient of the load-balancing loss (Switch, see moe/losses.py)
    c.losses.z = 0.001  # coefficient of the router z-loss (ST-MoE)
    c.adaptive = ConfigDict()
    c.adaptive.rate = 0.0  # > 0: the weight of the balance losses grows by this factor a step while more drops than target_drop; 0 = off
    c.adaptive.target_drop = 0.01  # fraction of assignments
    c.adaptive.limit = 100.0  # the weight stays within [1 / limit, limit]
    return c


def optim() -> ConfigDict:
    c = ConfigDict()
    c.learning_rate = 3e-3  # peak
    c.warmup_steps = 20  # linear, from 0
    c.clip_norm = 1.0  # global gradient norm; 0 = off
    c.decay_mask = "matrices"  # what weight decay applies to: "matrices", "all", "none"
    c.ema_decay = 0.0  # exponential moving average of the parameters, used by evaluation; 0 = off
    c.optimizer = "adamw"
    c.optimizers = ConfigDict()
    c.optimizers.adamw = ConfigDict({"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1})
    c.optimizers.lion = ConfigDict({"b1": 0.9, "b2": 0.99, "weight_decay": 0.1})
    c.optimizers.adafactor = ConfigDict({"decay_rate": 0.8, "weight_decay": 0.0})
    c.optimizers.muon = ConfigDict({"beta": 0.95, "ns_steps": 5, "weight_decay": 0.1, "adam_learning_rate": 1.0})
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
    c.micro_batch_size = (
        0  # rows of a micro-batch; smaller than batch_size = exact gradient accumulation; 0 = batch_size
    )
    c.nonfinite_patience = 0  # steps in a row with a non-finite loss or gradient that are skipped before the run stops
    c.init_from = ""  # workdir of another run whose parameters this one starts from
    c.stop_at = 0  # end after this step although train.steps (and the schedule) go further; 0 = off
    return c


def data() -> ConfigDict:
    c = ConfigDict()
    c.sources = (("embedded", 1.0),)  # (source, weight): "embedded", "embedded:drama,verse" or a prepared directory
    c.seq_len = 256  # tokens of a row
    c.slice_bytes = 0  # training bytes of each embedded domain, as whole documents; 0 = all
    c.heldout_bytes = 0  # held-out bytes of each embedded domain, likewise
    c.heldout_every = 20  # every n-th document of a domain is held out
    c.prefetch = 4  # batches read ahead
    return c

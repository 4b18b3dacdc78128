"""Translation by an encoder-decoder with mixtures of experts in both halves.

    python -m moe_jax.main --config configs/translation.py --config.data.folder=DATA \
        --workdir runs/translation
    python -m moe_jax.main --config configs/translation.py:prefix --config.data.folder=DATA \
        --workdir runs/translation_prefix

English to Spanish, the Bible, whole chapters held out. The variants: encdec (default), debian
(descriptions, English to German), prefix (a decoder alone, which has the source as the prefix of
its row), wmt (TFDS's WMT16, English to German: the first 2 % of 4.5 million training pairs, all of
newstest). The end shows sacreBLEU with its signature.
"""

from moe_jax.config import defaults

DATASETS = {
    "encdec": "bible_en_es",
    "debian": "debian_en_de",
    "prefix": "bible_en_es",
    "wmt": "tfds:wmt16_translate/de-en:train[:2%]#en-de",
}
VARIANTS = tuple(DATASETS)


def get_config(arg="encdec"):
    c = defaults()
    c.task = "translation_prefix" if arg == "prefix" else "translation"
    c.tasks[c.task].dataset = DATASETS[arg]
    c.model.vocab_size = c.tasks[c.task].vocab_size = 4096
    c.data.seq_len = 128 if arg == "prefix" else 64
    c.model.repeats = 2
    if arg == "prefix":
        c.model.kinds.decoder.bidirectional_prefix = True
    else:
        c.model.kind = "encdec"
        c.model.kinds.encdec.encoder_repeats = 2
    c.model.d_model = 128
    c.model.tie_embeddings = True
    c.model.moe.expert_hidden = 192
    c.train.steps = 1800
    c.train.batch_size = 32
    c.optim.optimizer = "muon"
    c.optim.learning_rate = 4e-3
    c.optim.warmup_steps = 100
    c.optim.ema_decay = 0.99
    c.eval.every = 500
    c.eval.batch_size = 64
    c.eval.sample_tokens = 0
    c.checkpoint.every = 500
    c.log.every = 50
    c.log.histogram_every = 200
    return c

"""The data sets that `python -m moe_jax data` converts: SETS, by name."""

from collections.abc import Callable

from moe_jax.data.publishers import banking77, debian, fashion_mnist, fsdd, sword, vader, wordnet
from moe_jax.data.publishers.contract import Converted, Published
from moe_jax.data.publishers.given import Given

DESCRIPTIONS = "each description under its package's own free licence"


def _debian(
    what: str,
    licence: str,
    indices: str,
    convert: Callable[[Given], Converted],
    config: str = "",
) -> Published:
    """Returns the facts about a set that is made of Debian's indices."""
    return Published(
        what=what,
        licence=licence,
        where=(
            "https://deb.debian.org/debian/dists/bookworm/ (Debian 12), or /var/lib/apt/lists "
            "where apt keeps them"
        ),
        give=f"{indices}; InRelease too, whose sha256 sums are then compared",
        convert=convert,
        config=config,
    )


def _translation(code: str, language: str, config: str = "") -> Published:
    """Returns the facts about the pairs of English and the language of a two-letter code."""
    return _debian(
        what=f"paragraphs of Debian's package descriptions, English and {language}",
        licence=DESCRIPTIONS,
        indices=f"main/i18n/Translation-en.xz and Translation-{code}.bz2",
        convert=debian.translation(code),
        config=config,
    )


VADER = Published(
    what="rated sentences of four domains (Hutto & Gilbert 2014)",
    licence="MIT (the ratings); the sentences are quotes of reviews, tweets and editorials",
    where="https://github.com/cjhutto/vaderSentiment",
    give=(
        "additional_resources/hutto_ICWSM_2014.tar.gz, or the folder of its *_GroundTruth.txt; "
        "their sha256 sums are compared"
    ),
    convert=vader.convert,
    config="configs/classification.py:vader",
)

SETS = {
    "wordnet": Published(
        what="WordNet's glosses, 45 supersenses",
        licence="WordNet 3.0 licence (like BSD; keep the notice, (c) 2006 Princeton University)",
        where=(
            "Debian's package wordnet-base (files in /usr/share/wordnet), or "
            "https://wordnetcode.princeton.edu/3.0/WNdb-3.0.tar.gz"
        ),
        give="the folder of data.noun, data.verb, data.adj and data.adv, or the archive",
        config="configs/classification.py:wordnet",
        convert=wordnet.convert,
    ),
    "debian": _debian(
        what="descriptions of Debian's packages, by section",
        licence=DESCRIPTIONS,
        indices="main/binary-amd64/Packages.xz and main/i18n/Translation-en.xz",
        convert=debian.sections,
        config="configs/classification.py:debian",
    ),
    "vader": VADER,
    # The same sentences, whose label is the domain.
    "vader_domain": VADER._replace(config=""),
    "banking77": Published(
        what="questions to a bank, 77 intents (Casanueva et al. 2020)",
        licence="CC BY 4.0",
        where="https://github.com/PolyAI-LDN/task-specific-datasets",
        give="the folder banking_data, or its train.csv and test.csv; their sha256 sums are "
        "compared",
        config="configs/classification.py:banking77",
        convert=banking77.convert,
    ),
    "bible_en_es": Published(
        what="verses of the King James Bible and the Reina-Valera of 1909",
        licence="public domain (in the United Kingdom the English text has a royal patent)",
        where="Debian's packages sword-text-kjv and sword-text-sparv; needs pysword (extra "
        "[tasks])",
        give="/usr/share/sword, or the folder that holds mods.d and modules after `dpkg-deb -x`",
        config="configs/translation.py",
        convert=sword.convert,
    ),
    "debian_en_de": _translation("de", "German", config="configs/translation.py:debian"),
    "debian_en_fr": _translation("fr", "French"),
    "debian_en_it": _translation("it", "Italian"),
    "fashion_mnist": Published(
        what="70,000 photographs of clothes, 28 x 28 (Xiao et al. 2017)",
        licence="MIT",
        where="https://github.com/zalandoresearch/fashion-mnist, or Debian's package "
        "dataset-fashion-mnist",
        give="the folder of the four *-ubyte.gz files; their md5 sums are compared",
        direct="where Debian's package is installed, it is read as it is: nothing to convert",
        config="configs/vision.py:fashion_mnist",
        convert=fashion_mnist.convert,
    ),
    "debian_depends": _debian(
        what="Debian's packages and what they depend on",
        licence="facts",
        indices="main/binary-amd64/Packages.xz",
        convert=debian.depends,
        config="configs/recommendation.py",
    ),
    "fsdd": Published(
        what="spoken digits of six speakers, 8 kHz",
        licence="CC BY-SA 4.0",
        where="https://github.com/Jakobovski/free-spoken-digit-dataset",
        give="the folder recordings; of 3,000 recordings the 900 of the figures are taken",
        direct="to train on all 3,000, put the folder itself into DATA/speech: it is read as it is",
        config="configs/speech.py",
        convert=fsdd.convert,
    ),
}

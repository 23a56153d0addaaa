"""The pre-tokenizers of byte-level BPE, by the names of tokenizer.ggml.pre.

Names are llama.cpp's; the regular expressions are those that the tokenizers' authors publish.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer: regular expressions applied in order, each to the pieces that the previous ones produced."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is not split into merges (ignore_merges)
    add_bos: bool = False  # BOS is added unless the file disables it


SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
THREE_FROM_THE_RIGHT = r"{0}{{1,3}}(?=(?:{0}{{3}})*(?!{0}))"


def _cased(upper: str, lower: str, suffix: str = "") -> str:
    """A regular expression for words that end before a capital letter."""
    return rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}"


LLAMA_3 = rf"{SUFFIX}|{WORDS}|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"
QWEN_2 = rf"{SUFFIX}|{WORDS}|\p{{N}}|{SYMBOLS}|{SPACES}"
GPT_4O = rf"{_cased(UPPER, LOWER, f'{SUFFIX}?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
GPT_4O_MARKS = (
    _cased(r"[\p{L}\p{M}&&[^a-z]]", r"[\p{L}\p{M}&&[^A-Z]]", f"{SUFFIX}?") + GPT_4O[GPT_4O.index(r"|\p{N}{1,3}") :]
)
NOT_HAN = r"&&[^\p{Han}]]"
KIMI_K2 = (
    rf"[\p{{Han}}]+|{_cased(UPPER[:-1] + NOT_HAN, LOWER[:-1] + NOT_HAN, f'{SUFFIX}?')}"
    rf"|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"
)
DEEPSEEK_SYMBOLS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    rf"{DEEPSEEK_SYMBOLS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",
)
CASED_LETTERS = (  # DeepSeek's own list; escaped, because editors normalize some of these characters
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
CJK = r"[一-龥ࠀ-一가-퟿]+"
DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK, r"\p{N}+")
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

_BY_NAMES: tuple[tuple[str, PreTokenizer], ...] = (  # (space-separated names, their pre-tokenizer)
    (
        "default",
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    ),
    (
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 mellum "
        "modern-bert mpt olmo jais trillion granite-docling exaone4",
        PreTokenizer((GPT_2,)),
    ),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer((LLAMA_3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((LLAMA_3,))),
    ("glm4 glm5", PreTokenizer((LLAMA_3,), ignore_merges=True)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", PreTokenizer((QWEN_2,))),
    (
        "qwen35",
        PreTokenizer(
            (
                rf"{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",
            )
        ),
    ),
    ("ufakzeka", PreTokenizer((rf"{WORDS}|\p{{N}}|{SYMBOLS}|{SPACES}",))),
    ("seed-coder", PreTokenizer((rf"{SUFFIX}|{WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",))),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer(
            (
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                r"|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    ("laguna", PreTokenizer((r"[^\n]+|[\n]+", QWEN_2))),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", rf"{SUFFIX}|{WORDS}|\p{{N}}+|{SYMBOLS}|{SPACES}"), ignore_merges=True)),
    (
        "jais-2",
        PreTokenizer(
            (
                rf"{SUFFIX}|{WORDS}|\p{{N}}{{1,3}}|{SYMBOLS}|\s*[\r\n]+|"
                + "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
                + r"|\s{1}",
            )
        ),
    ),
    (
        "exaone-moe",
        PreTokenizer(
            (
                rf"{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    (
        "tekken",
        PreTokenizer(
            (rf"{_cased(UPPER, LOWER)}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",),
            ignore_merges=True,
            add_bos=True,
        ),
    ),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((GPT_4O,))),
    ("granite-embed-multi-97m", PreTokenizer((GPT_4O_MARKS,), ignore_merges=True)),
    ("tiny_aya cohere2moe", PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", GPT_4O))),
    (
        "youtu",
        PreTokenizer(
            (
                r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
                rf"{_cased(UPPER, LOWER, f'{SUFFIX}?')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",
            ),
            ignore_merges=True,
        ),
    ),
    ("kimi-k2", PreTokenizer((KIMI_K2,))),
    ("deepseek-llm", PreTokenizer(DEEPSEEK_LLM)),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer(DEEPSEEK_3)),
    (
        "spark2_5",
        PreTokenizer(
            (
                *DEEPSEEK_3[:2],
                rf"{DEEPSEEK_SYMBOLS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
                r"\p{N}",
            )
        ),
    ),
    (
        "afmoe",
        PreTokenizer(
            (
                THREE_FROM_THE_RIGHT.format(r"\p{N}"),
                "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
                "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
                "\u1100-\u11ff]+",
                DEEPSEEK_3[2],
            )
        ),
    ),
    ("superbpe", PreTokenizer((r"\p{N}+", THREE_FROM_THE_RIGHT.format(r"\d")))),
    (
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
        PreTokenizer((r"\p{N}", GPT_2)),
    ),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT_2, r"[0-9][0-9][0-9]"))),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((BLOOM,))),
    ("viking", PreTokenizer((BLOOM, r"\p{N}"))),
    (
        "chameleon",
        PreTokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                GPT_2,
            ),
            add_bos=True,
        ),
    ),
)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: pre for names, pre in _BY_NAMES for name in names.split()}
NOT_BYTE_LEVEL = ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace")  # BPE on characters

"""Tokenizer and ends of an answer from GGUF metadata alone, as llama.cpp reads them (its src/llama-vocab.cpp is the reference)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktx.errors import BadFile, did_you_mean
from ktx.weights.pretokenizers import NOT_BYTE_LEVEL, PRE, Pre

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
BPE, SPM = "gpt2", "llama"
OTHERS = {  # values of tokenizer.ggml.model that are known and not built here
    "bert": "WordPiece",
    "t5": "unigram",
    "rwkv": "RWKV",
    "plamo2": "PLaMo-2",
    "gemma4": "BPE on characters",
    "hybriddna": "BPE with DNA",
    "whitespace": "BPE on words",
    "no_vocab": "no vocabulary",
    "none": "no vocabulary",
}
DEFAULT_IDS = {SPM: {"bos": 1, "eos": 2, "unknown": 0}, BPE: {"bos": 11, "eos": 11}}  # where a file names none
ENDS = frozenset(  # tokens that end an answer by their text
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> "
    "[EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[".split()
)
FIM_ENDS = {  # fill-in-the-middle: marks of padding, repository and file end an answer too
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]".split(),
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>".split(),
    "fim_sep": ["<|file_sep|>"],
}
SAMPLING = {  # keys under general.sampling -> transformers' names
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
NO_SAMPLING = ("sequence", "penalty_last_n", "xtc_threshold", "mirostat_tau", "mirostat_eta")  # nothing by themselves
NO_ENDS = (  # a token that ends nothing where the file has both of these
    ("<|end|>", ("<|return|>", "<|call|>")),
    ("<|end|>", ("<|return|>", "<|calls|>")),
    ("<|end|>", ("<|call|>", "<|flush|>")),
    ("<|end|>", ("<|calls|>", "<|flush|>")),
    ("</s>", ("<|tool_response>",)),
)
REMEDY = "give --model a folder with tokenizer.json"


@dataclass
class Vocabulary:
    """The tokens of a file, what they are, and the ids that have a meaning."""

    metadata: Mapping[str, Any]
    file: str
    model: str
    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]

    @classmethod
    def of(cls, metadata: Mapping[str, Any], file: str) -> Vocabulary:
        """BadFile where the arrays contradict each other."""
        tokens = [
            token or f"[EMPTY_{number}]" for number, token in enumerate(metadata.get("tokenizer.ggml.tokens", []))
        ]
        kinds = list(metadata.get("tokenizer.ggml.token_type", [])) or [NORMAL] * len(tokens)
        if len(kinds) < len(tokens):
            raise BadFile(f"{file}: has {len(tokens)} tokens but {len(kinds)} token types; convert it again")
        ids: dict[str, int] = {}
        for number, token in enumerate(tokens):
            if ids.setdefault(token, number) != number:
                raise BadFile(f"{file}: the token {token!r} has two ids, {ids[token]} and {number}; convert it again")
        return cls(metadata, file, str(metadata.get("tokenizer.ggml.model")), tokens, kinds, ids)

    def id(self, key: str) -> int | None:
        """The id under tokenizer.ggml.KEY_token_id, else the one that llama.cpp takes; None where there is none."""
        number = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(self.tokens):
            return number
        if number is not None:
            warnings.warn(
                f"{self.file}: tokenizer.ggml.{key}_token_id is {number}, the file has {len(self.tokens)} tokens; ignored",
                stacklevel=2,
            )
        usual = DEFAULT_IDS.get(self.model, {}).get(key)
        if usual is None or usual >= len(self.tokens):
            return None
        return usual if self.model == SPM or self.kinds[usual] == CONTROL else None  # 11 is Falcon's own mark

    def token(self, key: str) -> str | None:
        number = self.id(key)
        return None if number is None else self.tokens[number]

    def named(self, texts: Any) -> list[int]:
        """Ids of the texts that are tokens."""
        return sorted(self.ids[text] for text in texts if text in self.ids)

    @property
    def ends(self) -> list[int]:
        """Every id that ends an answer; the first is the end mark, if there is one."""
        eos = self.id("eos")
        found = {number for key in ("eos", "eot", "eom") if (number := self.id(key)) is not None}
        found |= set(self.named(ENDS))
        for key, texts in FIM_ENDS.items():
            number = self.id(key)
            found |= set(self.named(texts)[:1]) if number is None else {number}
        for text, others in NO_ENDS:
            if text in self.ids and all(other in self.ids for other in others):
                found.discard(self.ids[text])
        return sorted(found, key=lambda number: (number != eos, number))

    @property
    def controls(self) -> set[int]:
        """Ids of tokens that are no text."""
        marked = {number for number, kind in enumerate(self.kinds[: len(self.tokens)]) if kind in (CONTROL, UNKNOWN)}
        return marked | set(self.ends)

    @property
    def pre(self) -> Pre:
        """How BPE cuts a text. BadFile for a name that nobody knows."""
        name = self.metadata.get("tokenizer.ggml.pre")
        if name is None:
            warnings.warn(
                f"{self.file}: does not say how text is cut before BPE (tokenizer.ggml.pre); the default is taken, as llama.cpp does: "
                "answers may be worse; convert the model again",
                stacklevel=2,
            )
            name = "default"
        if name in NOT_BYTE_LEVEL:
            raise BadFile(f"{self.file}: tokenizer.ggml.pre is {name!r}, BPE on characters, not built here; {REMEDY}")
        if name not in PRE:
            raise BadFile(
                f"{self.file}: tokenizer.ggml.pre is {name!r}, a way to cut text that ktx does not know{did_you_mean(str(name), PRE)}; {REMEDY}"
            )
        return PRE[name]

    def marked(self, key: str, default: bool) -> int | None:
        """The mark that tokenizer.ggml.add_KEY_token asks for. BadFile where it is asked for and there is none."""
        if not self.metadata.get(f"tokenizer.ggml.add_{key}_token", default):
            return None
        number = self.id("seperator" if key == "sep" else key)  # the format spells it so
        if number is None:
            name = "seperator" if key == "sep" else key
            raise BadFile(
                f"{self.file}: every text gets the mark {key} (tokenizer.ggml.add_{key}_token, or tokenizer.ggml.pre by itself), "
                f"but tokenizer.ggml.{name}_token_id is missing; {REMEDY}"
            )
        return number


def end_tokens(metadata: Mapping[str, Any], file: str) -> list[int]:
    """Ids that end an answer, the end mark first; empty where the file has no tokenizer."""
    return Vocabulary.of(metadata, file).ends if "tokenizer.ggml.tokens" in metadata else []


def sampling_in(metadata: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Settings of transformers' GenerationConfig that a file recommends; a warning names those that ktx does not have."""
    prefix = "general.sampling."
    said = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    left = [f"{prefix}{key}" for key, value in said.items() if value and key not in (*SAMPLING, *NO_SAMPLING)]
    if left:
        warnings.warn(f"{file}: recommends {', '.join(left)}, which ktx does not have; left out", stacklevel=2)
    found = {SAMPLING[key]: value for key, value in said.items() if key in SAMPLING}
    if not found.get("temperature", 1.0):
        return {"do_sample": False}
    return found | {"do_sample": True} if found else {}


def tokenizer_from_gguf(metadata: Mapping[str, Any], file: str) -> Any:
    """A fast tokenizer made of the file's tokens, merges and chat templates (which transformers renders in its sandbox).

    BadFile where the file has none, or one of a kind that is not built here.
    """
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    if kind not in (BPE, SPM) or "tokenizer.ggml.tokens" not in metadata:
        what = f" ({OTHERS[kind]})" if kind in OTHERS else ""
        raise BadFile(f"{file}: has no tokenizer ktx can build (tokenizer.ggml.model is {kind!r}{what}); {REMEDY}")
    if list(metadata.get("tokenizer.ggml.suppress_tokens", [])):
        raise BadFile(f"{file}: tokenizer.ggml.suppress_tokens forbids tokens, which ktx does not do; {REMEDY}")
    vocabulary = Vocabulary.of(metadata, file)
    backend = _byte_level(vocabulary) if kind == BPE else _sentencepiece(vocabulary)
    _add_special(backend, vocabulary)
    named = {
        f"{name}_token": token
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (token := vocabulary.token(key)) is not None
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = _templates(metadata)
    return tokenizer


def _templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by name, as transformers has them."""
    key = "tokenizer.chat_template"
    own = metadata.get(key)
    default = {"default": own} if isinstance(own, str) else {}
    more = {
        name.removeprefix(f"{key}."): value
        for name, value in metadata.items()
        if name.startswith(f"{key}.") and isinstance(value, str)
    }
    return default | more if more else default.get("default")


def _add_special(backend: Any, vocabulary: Vocabulary) -> None:
    from tokenizers import AddedToken

    name = str(vocabulary.metadata.get("general.name", "")).lower()
    phi3 = "phi-3" in name or "phi3" in name  # white space behind its marks goes with them

    def added(number: int, special: bool) -> Any:
        token = vocabulary.tokens[number]
        strip = phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")
        return AddedToken(token, special=special, normalized=False, rstrip=strip)

    controls = vocabulary.controls
    backend.add_special_tokens([added(number, True) for number in sorted(controls)])
    own = (number for number, kind in enumerate(vocabulary.kinds[: len(vocabulary.tokens)]) if kind == USER_DEFINED)
    backend.add_tokens([added(number, False) for number in own if number not in controls])


def _byte_level(vocabulary: Vocabulary) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = []
    for number, merge in enumerate(vocabulary.metadata.get("tokenizer.ggml.merges", [])):
        left, space, right = merge.partition(" ")
        if not space or not left or not right:
            raise BadFile(f"{vocabulary.file}: tokenizer.ggml.merges[{number}] is {merge!r}, not two pieces")
        merges.append((left, right))
    pre = vocabulary.pre
    try:
        backend = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.whole_words))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise BadFile(f"{vocabulary.file}: its tokens and merges do not fit each other: {error}") from error
    steps = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.cuts]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    _mark(backend, vocabulary, begins=pre.begins)
    return backend


def _sentencepiece(vocabulary: Vocabulary) -> Any:
    """llama's SPM: BPE whose merges follow from the scores, with bytes for what has no piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, ids = vocabulary.tokens, vocabulary.ids
    scores = list(vocabulary.metadata.get("tokenizer.ggml.scores", []))
    if len(scores) != len(tokens):
        raise BadFile(f"{vocabulary.file}: has {len(tokens)} tokens but {len(scores)} scores")
    merges = []
    for token in tokens:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        merges += [(ids[token], pair) for pair in sorted(pairs, key=lambda p: (ids[p[0]], ids[p[1]]))]
    merges.sort(key=lambda entry: (-scores[entry[0]], entry[0]))
    unknown = vocabulary.token("unknown") or tokens[0]
    backend = Tokenizer(
        models.BPE(vocab=ids, merges=[pair for _, pair in merges], byte_fallback=True, fuse_unk=True, unk_token=unknown)
    )
    space = [normalizers.Prepend("▁")] if vocabulary.metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if space else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    _mark(backend, vocabulary, begins=True)
    return backend


def _mark(backend: Any, vocabulary: Vocabulary, begins: bool) -> None:
    """Has a text begin and end with its marks; of two texts the second follows the separator, or begins as the first."""
    from tokenizers import processors

    bos, eos, sep = vocabulary.marked("bos", begins), vocabulary.marked("eos", False), vocabulary.marked("sep", False)
    marks = {name: number for name, number in (("bos", bos), ("eos", eos), ("sep", sep)) if number is not None}
    if not marks:
        return
    begin, end = [name for name in ("bos",) if name in marks], [name for name in ("eos",) if name in marks]
    between = ["sep"] if sep is not None else begin
    backend.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *between, "$B", *end],
        special_tokens=[
            {"id": name, "ids": [number], "tokens": [vocabulary.tokens[number]]} for name, number in marks.items()
        ],
    )

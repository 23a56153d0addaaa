"""Builds the tokenizer and the end-of-generation tokens from GGUF metadata.

llama.cpp's src/llama-vocab.cpp is the reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktx.errors import BadFile, did_you_mean
from ktx.weights.pretokenizers import NOT_BYTE_LEVEL, PRE_TOKENIZERS, PreTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
BPE, SPM = "gpt2", "llama"
UNSUPPORTED_MODELS = {  # known values of tokenizer.ggml.model that are not supported
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
# llama.cpp's defaults when the file has no tokenizer.ggml.*_token_id
DEFAULT_IDS = {SPM: {"bos": 1, "eos": 2, "unknown": 0}, BPE: {"bos": 11, "eos": 11}}
EOG_TEXTS = frozenset(  # tokens that end generation, recognized by their text
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
FIM_EOG_TEXTS = {  # fill-in-the-middle tokens for padding, repository and file end generation too
    "fim_pad": ["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    "fim_rep": ["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    "fim_sep": ["<|file_sep|>"],
}
SAMPLING_KEYS = {  # keys under general.sampling -> transformers' names
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# Keys that have no effect by themselves
NO_EFFECT_KEYS = ("sequence", "penalty_last_n", "xtc_threshold", "mirostat_tau", "mirostat_eta")
NOT_EOG = (  # (token, others): the token does not end generation when the vocabulary contains all the others
    ("<|end|>", ("<|return|>", "<|call|>")),
    ("<|end|>", ("<|return|>", "<|calls|>")),
    ("<|end|>", ("<|call|>", "<|flush|>")),
    ("<|end|>", ("<|calls|>", "<|flush|>")),
    ("</s>", ("<|tool_response>",)),
)
REMEDY = "pass --model a folder with tokenizer.json"


@dataclass
class Vocabulary:
    """A file's tokens, their types and their ids. `kinds`: GGUF token types, one per token."""

    metadata: Mapping[str, Any]
    file: str
    model: str
    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], file: str) -> Vocabulary:
        """Reads the vocabulary; empty tokens get texts of their own, because a text must have one id.

        Raises BadFile when its arrays contradict each other.
        """
        tokens = [
            token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(metadata.get("tokenizer.ggml.tokens", []))
        ]
        kinds = list(metadata.get("tokenizer.ggml.token_type", [])) or [NORMAL] * len(tokens)
        if len(kinds) < len(tokens):
            raise BadFile(f"{file}: has {len(tokens)} tokens but {len(kinds)} token types; convert it again")
        ids: dict[str, int] = {}
        for token_id, token in enumerate(tokens):
            if ids.setdefault(token, token_id) != token_id:
                raise BadFile(f"{file}: the token {token!r} has two ids, {ids[token]} and {token_id}; convert it again")
        return cls(metadata, file, str(metadata.get("tokenizer.ggml.model")), tokens, kinds, ids)

    def id(self, key: str) -> int | None:
        """The id in tokenizer.ggml.KEY_token_id, else llama.cpp's default; None when there is neither."""
        token_id = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(self.tokens):
            return token_id
        if token_id is not None:
            warnings.warn(
                f"{self.file}: tokenizer.ggml.{key}_token_id is {token_id}, the file has {len(self.tokens)} tokens; "
                "ignored",
                stacklevel=2,
            )
        default_id = DEFAULT_IDS.get(self.model, {}).get(key)
        if default_id is None or default_id >= len(self.tokens):
            return None
        # The BPE default 11 is Falcon's; it applies only when the token is a control token.
        return default_id if self.model == SPM or self.kinds[default_id] == CONTROL else None

    def token(self, key: str) -> str | None:
        """The text of the token with `id(key)`."""
        token_id = self.id(key)
        return None if token_id is None else self.tokens[token_id]

    def ids_of(self, texts: Any) -> list[int]:
        """Ids of those texts that are tokens, sorted."""
        return sorted(self.ids[text] for text in texts if text in self.ids)

    @property
    def eog_ids(self) -> list[int]:
        """Ids of all tokens that end generation; the EOS token first, if there is one.

        As in llama.cpp, these are the file's EOS, EOT and EOM, and tokens with well-known texts (EOG_TEXTS,
        FIM_EOG_TEXTS), because files often name only one of several.
        """
        eos = self.id("eos")
        found = {token_id for key in ("eos", "eot", "eom") if (token_id := self.id(key)) is not None}
        found |= set(self.ids_of(EOG_TEXTS))
        for key, texts in FIM_EOG_TEXTS.items():
            token_id = self.id(key)
            found |= set(self.ids_of(texts)[:1]) if token_id is None else {token_id}
        for text, others in NOT_EOG:  # `text` does not end generation in a vocabulary with all the others
            if text in self.ids and all(other in self.ids for other in others):
                found.discard(self.ids[text])
        return sorted(found, key=lambda token_id: (token_id != eos, token_id))

    @property
    def control_ids(self) -> set[int]:
        """Ids of tokens that are not text."""
        control = {i for i, kind in enumerate(self.kinds[: len(self.tokens)]) if kind in (CONTROL, UNKNOWN)}
        return control | set(self.eog_ids)

    @property
    def pre_tokenizer(self) -> PreTokenizer:
        """Returns the pre-tokenizer that tokenizer.ggml.pre names: what cuts a text before BPE.

        Raises BadFile when it is unknown or not byte-level.
        """
        name = self.metadata.get("tokenizer.ggml.pre")
        if name is None:
            warnings.warn(
                f"{self.file}: the pre-tokenizer is missing (tokenizer.ggml.pre); using the default, as llama.cpp "
                "does: output may be worse; convert the model again",
                stacklevel=2,
            )
            name = "default"
        if name in NOT_BYTE_LEVEL:
            raise BadFile(
                f"{self.file}: tokenizer.ggml.pre is {name!r}, BPE on characters, which is not supported; {REMEDY}"
            )
        if name not in PRE_TOKENIZERS:
            raise BadFile(
                f"{self.file}: tokenizer.ggml.pre is {name!r}, an unknown pre-tokenizer"
                f"{did_you_mean(str(name), PRE_TOKENIZERS)}; {REMEDY}"
            )
        return PRE_TOKENIZERS[name]

    def added_token_id(self, key: str, default: bool) -> int | None:
        """The id of the token that tokenizer.ggml.add_KEY_token adds to every text; None when it adds none.

        Raises BadFile when the token is missing.
        """
        if not self.metadata.get(f"tokenizer.ggml.add_{key}_token", default):
            return None
        token_id = self.id("seperator" if key == "sep" else key)  # the format's spelling
        if token_id is None:
            name = "seperator" if key == "sep" else key
            raise BadFile(
                f"{self.file}: the {key} token is added to every text (by tokenizer.ggml.add_{key}_token or the "
                f"default of tokenizer.ggml.pre), but tokenizer.ggml.{name}_token_id is missing; {REMEDY}"
            )
        return token_id


def eog_token_ids(metadata: Mapping[str, Any], file: str) -> list[int]:
    """Ids of the tokens that end generation, the EOS token first; empty when the file has no tokenizer."""
    return Vocabulary.from_metadata(metadata, file).eog_ids if "tokenizer.ggml.tokens" in metadata else []


def recommended_sampling(metadata: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The sampling parameters that a file recommends, by transformers' GenerationConfig names.

    Warns about recommended parameters that ktx does not support.
    """
    prefix = "general.sampling."
    recommended = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    unsupported = [
        f"{prefix}{key}" for key, value in recommended.items() if value and key not in (*SAMPLING_KEYS, *NO_EFFECT_KEYS)
    ]
    if unsupported:
        warnings.warn(f"{file}: recommends {', '.join(unsupported)}, which ktx does not support; ignored", stacklevel=2)
    found = {SAMPLING_KEYS[key]: value for key, value in recommended.items() if key in SAMPLING_KEYS}
    if not found.get("temperature", 1.0):  # a temperature of 0 means greedy
        return {"do_sample": False}
    return found | {"do_sample": True} if found else {}


def tokenizer_from_gguf(metadata: Mapping[str, Any], file: str) -> PreTrainedTokenizerBase:
    """Builds a fast tokenizer from the file's tokens, merges and chat templates.

    transformers renders the chat templates in its sandbox.

    Raises:
        BadFile: the file has no tokenizer, or one of an unsupported kind.
    """
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    if kind not in (BPE, SPM) or "tokenizer.ggml.tokens" not in metadata:
        what = f" ({UNSUPPORTED_MODELS[kind]})" if kind in UNSUPPORTED_MODELS else ""
        raise BadFile(f"{file}: has no supported tokenizer (tokenizer.ggml.model is {kind!r}{what}); {REMEDY}")
    if list(metadata.get("tokenizer.ggml.suppress_tokens", [])):
        raise BadFile(f"{file}: tokenizer.ggml.suppress_tokens is not supported; {REMEDY}")
    vocabulary = Vocabulary.from_metadata(metadata, file)
    backend = _build_byte_level(vocabulary) if kind == BPE else _build_sentencepiece(vocabulary)
    _add_special(backend, vocabulary)
    special = {
        f"{name}_token": token
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (token := vocabulary.token(key)) is not None
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = _chat_templates(metadata)
    return tokenizer


def _chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Returns the file's chat template, or several by name, in transformers' form."""
    key = "tokenizer.chat_template"
    unnamed = metadata.get(key)
    default = {"default": unnamed} if isinstance(unnamed, str) else {}
    named = {
        name.removeprefix(f"{key}."): value
        for name, value in metadata.items()
        if name.startswith(f"{key}.") and isinstance(value, str)
    }
    return default | named if named else default.get("default")


def _add_special(backend: Any, vocabulary: Vocabulary) -> None:
    """Adds control tokens and user-defined tokens to the backend, so that it finds them before it splits a text."""
    from tokenizers import AddedToken

    name = str(vocabulary.metadata.get("general.name", "")).lower()
    phi3 = "phi-3" in name or "phi3" in name  # its special tokens absorb the white space after them

    def added(token_id: int, special: bool) -> Any:
        token = vocabulary.tokens[token_id]
        strip = phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")
        return AddedToken(token, special=special, normalized=False, rstrip=strip)

    controls = vocabulary.control_ids
    backend.add_special_tokens([added(i, True) for i in sorted(controls)])
    user_defined = (i for i, kind in enumerate(vocabulary.kinds[: len(vocabulary.tokens)]) if kind == USER_DEFINED)
    backend.add_tokens([added(i, False) for i in user_defined if i not in controls])


def _build_byte_level(vocabulary: Vocabulary) -> Any:
    """Builds GPT-2's kind of tokenizer: BPE over bytes, with the file's merges and its pre-tokenizer's patterns.

    Raises BadFile when a merge is not a pair or names an unknown token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = []
    for i, merge in enumerate(vocabulary.metadata.get("tokenizer.ggml.merges", [])):
        left, space, right = merge.partition(" ")
        if not space or not left or not right:
            raise BadFile(f"{vocabulary.file}: tokenizer.ggml.merges[{i}] is {merge!r}, expected two parts")
        merges.append((left, right))
    pre = vocabulary.pre_tokenizer
    try:
        backend = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.ignore_merges))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise BadFile(f"{vocabulary.file}: its tokens and merges do not match: {error}") from error
    splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    _add_bos_eos(backend, vocabulary, begins=pre.add_bos)
    return backend


def _build_sentencepiece(vocabulary: Vocabulary) -> Any:
    """Builds llama's SentencePiece tokenizer: BPE, with byte tokens for unknown characters.

    Files store scores of tokens and no merges: every split of a token in two tokens is a merge, in the order of scores.
    """
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
    _add_bos_eos(backend, vocabulary, begins=True)
    return backend


def _add_bos_eos(backend: Any, vocabulary: Vocabulary, begins: bool) -> None:
    """Configures the BOS and EOS tokens around a text; between two texts the separator, or else BOS.

    `begins`: whether BOS is added when the metadata does not decide it.
    """
    from tokenizers import processors

    bos, eos, sep = (
        vocabulary.added_token_id("bos", begins),
        vocabulary.added_token_id("eos", False),
        vocabulary.added_token_id("sep", False),
    )
    added = {name: token_id for name, token_id in (("bos", bos), ("eos", eos), ("sep", sep)) if token_id is not None}
    if not added:
        return
    begin, end = [name for name in ("bos",) if name in added], [name for name in ("eos",) if name in added]
    between = ["sep"] if sep is not None else begin
    backend.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *between, "$B", *end],
        special_tokens=[
            {"id": name, "ids": [token_id], "tokens": [vocabulary.tokens[token_id]]} for name, token_id in added.items()
        ],
    )

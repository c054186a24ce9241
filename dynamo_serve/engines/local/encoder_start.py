"""From wishes to a running encoder: load, compare with the model's own forward."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.engines.local.block_attention import BlockAttention
from dynamo_serve.engines.local.discovery import FORWARD_FAILURES, UnsupportedModel, architecture
from dynamo_serve.engines.local.encoder_runner import (
    Encoder,
    EncoderByLength,
    EncoderRunner,
    PackedEncoder,
    Text,
)
from dynamo_serve.engines.local.facts import Facts, num_bytes
from dynamo_serve.engines.local.loader import (
    load_config,
    load_model,
    position_limit,
    resolve_device,
)
from dynamo_serve.engines.local.malloc import keep_freed_memory
from dynamo_serve.engines.local.pooling_kind import pooling_kind
from dynamo_serve.engines.local.self_check import MAX_WINDOW, TOLERANCE
from dynamo_serve.engines.local.startup import Wishes, use
from dynamo_serve.errors import EngineStartError

logger = logging.getLogger(__name__)

_names = (f"dynamo_serve_block_{i}" for i in itertools.count())  # one function per engine
SCORE = "score"
OWN_ATTENTION = ("sdpa", "eager")  # the model's, the better one first


class Loaded(NamedTuple):
    """A model and who runs it, with the attention function that is registered for it, if any."""

    encoder: Encoder
    runner: EncoderRunner
    attention: str = ""

    def close(self) -> None:
        if self.attention:
            del ALL_ATTENTION_FUNCTIONS[self.attention]


class ReadyEncoder(NamedTuple):
    """What `EncoderEngine` holds between start and close."""

    spec: EngineSpec
    loaded: Loaded


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model reads whole texts and writes none: of a family that is trained so, and not
    one of its decoders."""
    name = architecture(config)
    if name.endswith(("ForCausalLM", "LMHeadModel")) or getattr(config, "is_decoder", False):
        return False
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder


def start_encoder(wishes: Wishes, progress: Callable[[str, float], None]) -> ReadyEncoder:
    """Raises `EngineStartError` with the remedy; nothing stays registered then."""
    _check(wishes)
    device = resolve_device(wishes.engine.device)
    use(device, wishes.engine.threads)
    progress("weights", 0.0)
    config = load_config(wishes.path)
    kind = _kind(wishes, config)
    wanted = Wanted(wishes, config, kind, device)
    loaded = _packed(wanted) or _by_length(wanted)
    progress("weights", 1.0)
    try:
        longest = _longest(wishes.model.max_model_len, loaded.encoder)
    except BaseException:
        loaded.close()
        raise
    if device.type == "cpu":
        keep_freed_memory()
    progress("warm-up", 1.0)
    spec = EngineSpec(
        max_model_len=longest,
        page_size=longest,  # a slot is one very large page
        num_pages=wishes.limits.max_decode_sequences,
        vocab_size=config.get_text_config().vocab_size,
        facts=_facts(loaded),
        pooling=kind,
        vector_size=1 if kind == SCORE else config.get_text_config().hidden_size,
        generates=False,
        whole_prompts=True,
    )
    return ReadyEncoder(spec, loaded)


def _check(wishes: Wishes) -> None:
    """What is there for decoders only is refused by name."""
    for key, value, allowed in (
        ("model.quantization", wishes.model.quantization, ("none",)),
        ("model.lighter", wishes.model.lighter, ("",)),
        ("engine.attention", wishes.engine.attention, ("auto", "torch")),
        ("engine.kernels", wishes.engine.kernels, ("auto", "torch")),
        ("cache.num_pages", wishes.cache.num_pages, (0,)),
        ("cache.kv_dtype", wishes.cache.kv_dtype, ("auto",)),
        ("cache.host_gib", wishes.cache.host_gib, (0,)),
        ("cache.disk_gib", wishes.cache.disk_gib, (0,)),
        ("cache.shared_prefixes", wishes.cache.shared_prefixes, ("",)),
    ):
        if value not in allowed:
            raise EngineStartError(
                f"{key}: {value} is for models that write; {wishes.path} is an encoder, which "
                "transformers' own modules run: leave it out"
            )


def _kind(wishes: Wishes, config: PreTrainedConfig) -> str:
    if not architecture(config).endswith("ForSequenceClassification"):
        return pooling_kind(wishes.path, wishes.model.pooling, is_encoder=True)
    if config.num_labels != 1:
        raise UnsupportedModel(
            config, f"a classifier with {config.num_labels} labels ranks nothing"
        )
    if wishes.model.pooling != "auto":
        raise EngineStartError(
            f"model.pooling: {wishes.model.pooling} is for embeddings; {wishes.path} is a "
            "cross-encoder: leave it at auto"
        )
    return SCORE


class Wanted(NamedTuple):
    """What is to be loaded, and what is to be made of its texts."""

    wishes: Wishes
    config: PreTrainedConfig
    kind: str
    device: torch.device

    def load(self, attention: str) -> Encoder:
        """Raises `UnsupportedModel` for an attention that it cannot have."""
        auto: Any = AutoModelForSequenceClassification if self.kind == SCORE else AutoModel
        # What is behind the last hidden state is not asked for an embedding.
        unused = () if self.kind == SCORE else ("pooler.",)
        path, dtype = self.wishes.path, self.wishes.model.dtype
        model = load_model(path, self.config, dtype, self.device, attention, auto, unused)
        return Encoder.of(model)


def _packed(wanted: Wanted) -> Loaded | None:
    """None, with the reason in the log, for a model that has to use its own attention."""
    attention = BlockAttention()
    name = next(_names)
    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        encoder = wanted.load(name)
        runner = PackedEncoder(encoder, attention)
        _compare(runner, encoder, wanted.kind, attention, name)
        return Loaded(encoder, runner, name)
    except UnsupportedModel as reason:
        del ALL_ATTENTION_FUNCTIONS[name]
        logger.info("only texts of one length run together: %s", reason)
        return None
    except BaseException:
        del ALL_ATTENTION_FUNCTIONS[name]
        raise


def _by_length(wanted: Wanted) -> Loaded:
    """Raises `UnsupportedModel` if that does not work either."""
    for attention in OWN_ATTENTION:
        try:
            encoder = wanted.load(attention)
            runner = EncoderByLength(encoder)
            with torch.inference_mode():
                runner.vectors(_trial(encoder, wanted.kind))
            return Loaded(encoder, runner)
        except (UnsupportedModel, *FORWARD_FAILURES) as error:
            if attention == OWN_ATTENTION[-1]:
                raise UnsupportedModel(wanted.config, f"a forward failed: {error}") from error
    raise AssertionError("there is an attention for everybody")


def _compare(
    runner: EncoderRunner, encoder: Encoder, kind: str, attention: BlockAttention, name: str
) -> None:
    """Raise `UnsupportedModel` if texts end to end do not give what each alone gives with the
    model's own attention."""
    config, texts = encoder.model.config, _trial(encoder, kind)
    try:
        with torch.inference_mode():
            ours = torch.cat(runner.vectors(texts))
            encoder.model.set_attn_implementation("eager")
            alone = EncoderByLength(encoder)
            plain = torch.cat([vector for text in texts for vector in alone.vectors([text])])
            encoder.model.set_attn_implementation(name)
    except FORWARD_FAILURES as error:
        raise UnsupportedModel(config, f"a packed forward failed: {error}") from error
    if attention.objections:
        raise UnsupportedModel(config, attention.objections[0])
    if not attention.modules:
        raise UnsupportedModel(config, "its attention does not go through AttentionInterface")
    off = float((ours - plain).norm() / plain.norm().clamp_min(1e-9))
    if not off <= TOLERANCE[encoder.model.dtype]:
        raise UnsupportedModel(config, f"packed texts differ from the same alone (by {off:.1e})")
    logger.info("packed texts agree with the same alone, relative error %.1e", off)


def _trial(encoder: Encoder, kind: str) -> list[Text]:
    """Random texts of several lengths, one of them longer than a window that is not too long."""
    config = encoder.model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    longest = min(_limit(encoder), max(9, window + 4 if window <= MAX_WINDOW else 0))
    generator = torch.Generator().manual_seed(1)
    texts = []
    for length in (longest, max(1, longest - 2), max(1, longest - 2), 1):
        # Not the lowest ids, which are special: some models look for their padding.
        ids = torch.randint(
            config.vocab_size // 2, config.vocab_size, (length,), generator=generator
        )
        second_at = length // 2 if "token_type_ids" in encoder.inputs and _has_two(encoder) else 0
        kinds = (kind,) if kind == SCORE else ("mean", "last", "cls")
        texts += [Text(ids.tolist(), second_at, each) for each in kinds]
    return texts


def _has_two(encoder: Encoder) -> bool:
    """Whether the second text of a pair is told from the first."""
    return getattr(encoder.model.config, "type_vocab_size", 0) > 1


def _limit(encoder: Encoder) -> int:
    """The longest text, in tokens."""
    return position_limit(encoder.model.config).num_tokens - encoder.first_position


def _longest(wish: int, encoder: Encoder) -> int:
    limit = _limit(encoder)
    if wish > limit:
        name = architecture(encoder.model.config)
        raise EngineStartError(
            f"model.max_model_len: {wish} is more than the {limit} tokens that {name} takes"
        )
    return wish or limit


def _facts(loaded: Loaded) -> Facts:
    model = loaded.encoder.model
    device, parameters = model.device, list(model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "architecture": architecture(model.config),
        "model_type": str(model.config.model_type),
        "device": name if device.type == "cpu" else f"{device} ({name})",
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_parameters": sum(p.numel() for p in parameters),
        "weights_bytes": sum(map(num_bytes, parameters)),
        "attention_backend": loaded.runner.name,
        "kernels": "torch",
        "quantization": "none",
        "torch_version": str(torch.__version__),
        "transformers_version": str(transformers.__version__),
        "threads": torch.get_num_threads(),
    }

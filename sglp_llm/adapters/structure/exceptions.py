"""What neither the table of configuration keys nor the modules say about a model type: data, one entry a type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Exceptions:
    """What is special about the decoder layers of a type.

    Attributes:
        refuse: Why layers of no model of the type can be removed.
        refuse_settings: Configuration key -> why a model that sets it (to something truthy) cannot be pruned.
        pin_first: Why the first decoder layer must stay; empty = it need not.
        pin_last: Why the last decoder layer must stay.
        readers: Key of a list with one entry a layer, the entry of layers that use what the nearest layer before them with the
            other entry has computed, and that other entry.
        shared_from: Key of the number of last layers that use the keys and values of the nearest layer of their kind
            (``layer_types``) before them.
        fused: Parameters outside the layers that hold one block a layer: name in the model -> the dimension of the blocks.
        scale_with_root: Configuration key that the model divides by the square root of the depth: it is multiplied by
            ``sqrt(new / old)``.
        keep_keys: Keys of patterns that the model itself reads, and that are therefore kept.
        regular: Pairs of keys, a period and an offset: every layer is built otherwise whose index leaves that remainder, and no
            list of layers can say so instead.
        sharing: Key of a list with one entry a layer, and the entry of layers that share weights, which files hold under the
            first one's name.
        numbers_sharing: Whether the layers that share weights hold parts of their own by their number among them.
        flags: Attributes of modules that say whether a layer hands its keys and values on; `shared_from` says which must.
    """

    refuse: str = ""
    refuse_settings: Mapping[str, str] = field(default_factory=dict)
    pin_first: str = ""
    pin_last: str = ""
    readers: tuple[str, str, str] | None = None
    shared_from: str = ""
    fused: Mapping[str, int] = field(default_factory=dict)
    scale_with_root: str = ""
    keep_keys: tuple[str, ...] = ()
    regular: tuple[tuple[str, str], ...] = ()
    sharing: tuple[str, str] | None = None
    numbers_sharing: bool = False
    flags: frozenset[str] = frozenset()


_PER_LAYER_EMBEDDINGS = {
    "model.embed_tokens_per_layer.weight": 1,
    "model.per_layer_model_projection.weight": 0,
}
_HANDS_ON = frozenset({"store_full_length_kv"})
_GEMMA4 = Exceptions(
    pin_last="transformers gives the last layer full attention",
    shared_from="num_kv_shared_layers",
    fused=_PER_LAYER_EMBEDDINGS,
    flags=_HANDS_ON,
)
_STACKS = "it runs several stacks of layers"
_DRAFTER = "it drafts tokens from the states of another model"
_HALF = "its decoder reads the states of an encoder"
_ANOTHER_LIST = "its blocks are spread over several lists of modules, and there is no list of decoder layers"

EXCEPTIONS: Mapping[str, Exceptions] = MappingProxyType(
    {
        "bert-generation": Exceptions(refuse="it is an encoder"),
        "blt": Exceptions(refuse=_STACKS),
        "gemma4_assistant": Exceptions(refuse=_DRAFTER),
        "gemma4_unified_assistant": Exceptions(refuse=_DRAFTER),
        "diffusion_gemma": Exceptions(
            refuse="it fills in blocks of tokens, and the losses here are those of the next one"
        ),
        "mllama": Exceptions(refuse="some of its layers read an image alone, and a calibration on text skips them"),
        "moshi": Exceptions(refuse=_STACKS),
        "musicgen": Exceptions(refuse=_STACKS),
        "musicgen_melody": Exceptions(refuse=_STACKS),
        "prophetnet": Exceptions(refuse=_HALF),
        "trocr": Exceptions(refuse=_HALF),
        "whisper": Exceptions(refuse=_HALF),
        "xlnet": Exceptions(
            refuse="it is trained on permutations of the text, and its states may see what comes later"
        ),
        "beam": Exceptions(refuse="its attention adds the residual of a layer that it finds by its own index"),
        "diffllama": Exceptions(
            refuse="its attention uses a constant computed from the layer's own index (lambda_init)"
        ),
        "exaone4": Exceptions(keep_keys=("sliding_window_pattern",)),
        "exaone_moe": Exceptions(keep_keys=("sliding_window_pattern",)),
        "gemma3n_text": Exceptions(shared_from="num_kv_shared_layers", fused=_PER_LAYER_EMBEDDINGS, flags=_HANDS_ON),
        "gemma4_text": _GEMMA4,
        "gemma4_unified_text": _GEMMA4,
        "glm_moe_dsa": Exceptions(readers=("indexer_types", "shared", "full")),
        "gpt-sw3": Exceptions(
            refuse_settings={
                "scale_attn_by_inverse_layer_idx": "its attention divides by the layer's own index, which pruning changes"
            }
        ),
        "gpt_neox_japanese": Exceptions(pin_last="it alone has a bias behind its attention"),
        "hrm_text": Exceptions(refuse="it runs two stacks of layers in a loop"),
        "hy_v4": Exceptions(readers=("indexer_types", "shared", "full")),
        "inkling2_text": Exceptions(refuse="its residual stream is cut into blocks of layers counted by index"),
        "jamba": Exceptions(
            regular=(("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
        ),
        "minimax": Exceptions(pin_first="with linear attention in the first layer, generation with a cache goes wrong"),
        "minicpm3": Exceptions(scale_with_root="scale_depth"),
        "modernbert-decoder": Exceptions(pin_first="it alone has no norm before its attention"),
        "reformer": Exceptions(refuse="its layers are reversible and compute two residual streams"),
        "rwkv": Exceptions(
            pin_first="it alone normalises the embeddings",
            refuse_settings={
                "rescale_every": "it halves the hidden states at layers counted by index; "
                "set it to 0, which makes a difference in float16 alone"
            },
        ),
        "xlm": Exceptions(refuse=_ANOTHER_LIST),
        "zamba": Exceptions(sharing=("layers_block_type", "hybrid")),
        "zamba2": Exceptions(sharing=("layers_block_type", "hybrid"), numbers_sharing=True),
        "zaya": Exceptions(
            refuse="each layer's router reads the state of the router before it, and the first has none"
        ),
    }
)

"""The operations that a graph of a stranger may use: functions of tensors and sizes, and nothing else.

An operation is listed by its ATen name. Of its overloads those are allowed that write into no tensor but the first, and
that only where the name says so (`relu_`), and that take no generator of random numbers. Operations that read files,
start code, share memory between tensors in ways of their own (`set_`, `as_strided`), draw random numbers, or whose
results have sizes that depend on values (`nonzero`) are not listed.
"""

import math
import operator
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

# Overloads whose results have sizes that depend on values, or that trust such values.
_NOT_THESE = frozenset(
    ("repeat_interleave.Tensor", "repeat_interleave.self_Tensor", "narrow.Tensor",
     "tensor_split.tensor_indices_or_sections")
)  # fmt: skip
# One line for each kind, so that a reader can see what is missing.
_ELEMENTWISE = """
    abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor
    ceil celu clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div divide elu eq erf erfc erfinv exp
    exp2 expm1 floor floor_divide fmax fmin fmod frac ge gelu glu greater greater_equal gt hardshrink hardsigmoid
    hardswish hardtanh heaviside hypot isfinite isinf isnan le leaky_relu lerp less less_equal lgamma log log10 log1p
    log2 log_sigmoid logaddexp logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish
    mul multiply nan_to_num ne neg negative not_equal positive pow prelu rad2deg reciprocal relu relu6 remainder round
    rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink special_erf special_expit special_expm1
    special_log1p sqrt square sub subtract tan tanh threshold true_divide trunc where xlogy __and__ __or__ __xor__
    __lshift__ __rshift__ _prelu_kernel
"""
_IN_PLACE = """
    abs_ add_ addcdiv_ addcmul_ bitwise_and_ bitwise_not_ bitwise_or_ ceil_ celu_ clamp_ clamp_max_ clamp_min_ copy_
    cos_ detach_ div_ dropout_ elu_ erf_ exp_ expm1_ fill_ floor_ fmod_ ge_ gt_ hardsigmoid_ hardswish_ hardtanh_
    index_add_ index_copy_ index_fill_ index_put_ le_ leaky_relu_ lerp_ log_ log1p_ logical_and_ logical_not_ lt_
    masked_fill_ mish_ mul_ nan_to_num_ neg_ pow_ reciprocal_ relu_ relu6_ remainder_ round_ rsqrt_ scatter_
    scatter_add_ selu_ sigmoid_ sign_ silu_ sin_ sqrt_ square_ sub_ tanh_ threshold_ tril_ triu_ trunc_ zero_
"""
_REDUCTIONS = """
    all amax amin aminmax any argmax argmin argsort cummax cummin cumprod cumsum kthvalue linalg_norm
    linalg_vector_norm log_softmax logcumsumexp logsumexp max mean median min norm prod softmax sort std std_mean sum
    topk var var_mean _log_softmax _softmax _safe_softmax
"""
_PRODUCTS = """
    addbmm addmm addmv addr baddbmm bilinear bmm cosine_similarity cross dot einsum inner kron linalg_cross
    linalg_matmul linalg_vecdot linear matmul mm mv outer scaled_dot_product_attention tensordot vdot
"""
_CONVOLUTIONS = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
"""
_NORMALISATIONS = """
    batch_norm cudnn_batch_norm group_norm instance_norm layer_norm native_batch_norm native_group_norm
    native_layer_norm rms_norm _fused_rms_norm _native_batch_norm_legit_no_training _weight_norm _weight_norm_interface
"""
_POOLING = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices _adaptive_avg_pool2d _adaptive_avg_pool3d
"""
_IMAGES = """
    affine_grid_generator channel_shuffle col2im constant_pad_nd grid_sampler grid_sampler_2d grid_sampler_3d im2col
    pad pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d
"""
_SHAPES = """
    alias atleast_1d atleast_2d atleast_3d broadcast_to cat chunk clone concat concatenate contiguous detach diag
    diag_embed diagonal dstack expand expand_as expand_copy fliplr flip flipud flatten hstack lift_fresh
    lift_fresh_copy meshgrid moveaxis movedim narrow permute ravel repeat repeat_interleave reshape reshape_as roll
    rot90 select slice split split_with_sizes squeeze stack swapaxes swapdims t tensor_split tile transpose tril triu
    unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view view_as vstack
    _reshape_copy _unsafe_view permute_copy view_copy squeeze_copy unsqueeze_copy transpose_copy select_copy slice_copy
    t_copy
"""
_INDEXING = """
    bucketize embedding gather index index_add index_copy index_fill index_put index_select masked_scatter scatter
    scatter_add scatter_reduce searchsorted select_scatter slice_scatter take take_along_dim _unsafe_index
"""
_CREATION = """
    arange eye full full_like linspace new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices
    triu_indices zeros zeros_like
"""
_COMPLEX = """
    complex conj conj_physical fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_irfft fft_irfft2 fft_irfftn
    fft_rfft fft_rfft2 fft_rfftn imag polar real resolve_conj resolve_neg view_as_complex view_as_real
"""
_TYPES = """
    to type_as _to_copy
"""
_RECURRENT = """
    gru gru_cell lstm lstm_cell rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell
"""
#: Random in training, and nothing in evaluation mode: allowed where their flags say evaluation.
_DROPOUTS = """
    alpha_dropout alpha_dropout_ dropout feature_alpha_dropout feature_dropout feature_dropout_ native_dropout rrelu
"""
_SIZES = """
    sym_size sym_numel
"""
_LISTED = frozenset(
    " ".join(
        (
            _ELEMENTWISE, _IN_PLACE, _REDUCTIONS, _PRODUCTS, _CONVOLUTIONS, _NORMALISATIONS, _POOLING, _IMAGES, _SHAPES,
            _INDEXING, _CREATION, _COMPLEX, _TYPES, _RECURRENT, _DROPOUTS, _SIZES,
        )
    ).split()
)  # fmt: skip

#: Arithmetic of sizes, by the names that torch.export gives them.
SIZES: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
    },
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "torch.sym_float": float,
    "torch.sym_int": int,
    "torch.sym_ite": lambda condition, first, second: first if condition else second,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_not": operator.not_,
    "torch.sym_sum": sum,
}

#: Arithmetic by which a result may be larger for smaller inputs.
SHRINKING = frozenset(
    (
        *(f"_operator.{name}" for name in ("sub", "floordiv", "truediv", "mod", "neg")),
        *(f"_operator.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge")),
        "torch.sym_ite",
        "torch.sym_min",
        "torch.sym_not",
    )
)

#: A region of the graph in which autocast is off, whatever it is outside.
AUTOCAST_OFF, REGION_ENDS = "region.autocast_off", "region.end"


@cache
def operations() -> dict[str, Any]:
    """Return the allowed ATen overloads by name, such as `aten.relu.default`."""
    return {f"aten.{name}.{overload._overloadname}": overload for name in _LISTED for overload in _overloads(name)}


def allowed() -> frozenset[str]:
    """Return the names of all that a node of a graph may do."""
    return frozenset((*operations(), *SIZES, AUTOCAST_OFF, REGION_ENDS))


def _overloads(name: str) -> Iterator[Any]:
    packet = getattr(torch.ops.aten, name, None)
    for overload in () if packet is None else (getattr(packet, each) for each in packet.overloads()):
        if _is_safe(name, overload._schema):
            yield overload


def _is_safe(name: str, schema: Any) -> bool:
    """Return whether an overload is of tensors, draws no random numbers, and writes into its first argument at most."""
    types = [str(one.type) for one in (*schema.arguments, *schema.returns)]
    # Others are TorchScript's: of lists, texts, and of dimensions with names, which torch gave up.
    of_tensors = any("Tensor" in one for one in types) and not any("Dimname" in one for one in types)
    # `data` is of sequences that are packed by their lengths, which are values.
    if schema.overload_name.startswith(("prim_", "data")) or not of_tensors:
        return False
    if f"{name}.{schema.overload_name}" in _NOT_THESE:
        return False
    written = [place for place, argument in enumerate(schema.arguments) if argument.is_write]
    if name in _DROPOUTS.split():
        return written in ([], [0])
    random = any("Generator" in one for one in types)
    return not random and written == ([0] if name in _IN_PLACE.split() else [])

"""SeqMSE from Qualcomm's AIMET: chooses the scale of a weight that minimizes the output error on real requests.

Rounding to nearest with a scale from the largest weight wastes codes on outliers. SeqMSE tries smaller scales, matrix
by matrix after those that are already rounded, and keeps the one with the smallest squared error for each channel.
"""

import contextlib
import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx

from conversion.qnn.qdq.encoding import WeightCodes, round_to_nearest, round_with_scales
from conversion.qnn.qdq.quantize import weights_of

CANDIDATES = 20  # scales to try, from a twentieth of the usual one upwards
EXTRA = "pip install 'genieblue[aimet]'"
logger = logging.getLogger(__name__)


def check_aimet_installed() -> None:
    """`OSError` that names the extra if AIMET is not installed."""
    with _quietly():
        try:
            import aimet_onnx  # noqa: F401
        except ImportError as error:
            raise OSError(f"The rounding `seqmse` needs AIMET, which is not installed ({error}): {EXTRA}") from error


class SeqMse:
    """A `Rounding` for one part of the blocks; matrices that the views share get equal codes.

    Call `fit` with each float graph before its weights are rounded.
    """

    def __init__(self) -> None:
        self._codes: dict[bytes, WeightCodes] = {}
        self._scales: dict[str, np.ndarray] = {}

    def fit(
        self, model: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]], bits_of: Callable[[str], int]
    ) -> None:
        """Chooses scales for the matrices of `model` that no earlier graph had, on calls with `feeds`."""
        weights = weights_of(model)
        known = {name for name, (values, _) in weights.items() if self._key(values, bits_of(name)) in self._codes}
        self._scales = seqmse_scales(model, feeds, bits_of, leave=known)

    def __call__(self, name: str, weight: np.ndarray, bits: int, axis: int | None) -> WeightCodes:
        """Codes of a matrix; those that are inputs of the graph (`axis` None) are rounded to nearest."""
        if axis is None:
            return round_to_nearest(name, weight, bits, axis)
        key = self._key(weight, bits)
        if key not in self._codes:
            self._codes[key] = round_with_scales(weight, self._scales[name], bits, axis)
        return self._codes[key]

    @staticmethod
    def _key(weight: np.ndarray, bits: int) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(weight).data).digest() + bytes([bits])


def seqmse_scales(
    model: onnx.ModelProto,
    feeds: Sequence[Mapping[str, np.ndarray]],
    bits_of: Callable[[str], int],
    *,
    leave: set[str] = frozenset(),
) -> dict[str, np.ndarray]:
    """Scales (channels,) by name for the matrices of a float graph, except those in `leave`."""
    check_aimet_installed()
    with _quietly():
        from aimet_onnx import QuantizationSimModel, apply_seq_mse, int4, int16

        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        simulation = QuantizationSimModel(
            copied, param_type=int4, activation_type=int16, quant_scheme="min_max", config_file="htp_v79",
            providers=["CPUExecutionProvider"],
        )  # fmt: skip
        weights = weights_of(model)
        for name in weights:
            quantizer = simulation.qc_quantize_op_dict[name]
            quantizer.enable_per_channel_quantization()
            quantizer.set_bitwidth(bits_of(name))
            quantizer.use_strict_symmetric = True
        users = {name: node.name for node in simulation.model.model.graph.node for name in node.input}
        excluded = [users[name] for name in leave if name in users]
        apply_seq_mse(simulation, list(feeds), num_candidates=CANDIDATES, nodes_to_exclude=excluded)
        found = {name: simulation.qc_quantize_op_dict[name].get_encodings() for name in weights if name not in leave}
    logger.info("SeqMSE chose scales for %d matrices.", len(found))
    return {name: np.array([one.delta for one in encodings], np.float32) for name, encodings in found.items()}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silences AIMET, which prints and logs a lot."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)

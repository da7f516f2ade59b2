"""Checks of a prediction that is off: somebody has to decide by it."""

import inspect

from memserve.config.errors import ConfigError, class_name
from memserve.config.schema import RunConfig
from memserve.config.targets import is_a, node_class

ASKING = {"policy": "cost_model", "decode_policy": "cost_model", "rejection": "cost_model", "swap": "costs"}


def check_prediction(cfg: RunConfig) -> None:
    """Raises ConfigError for another prediction than the exact one where nobody predicts."""
    if is_a(cfg.prediction, "ExactPrediction") or not is_a(cfg.fetch, "NeverFetch"):
        return
    nodes = {name: getattr(cfg, name) for name in ASKING}
    if not any(ASKING[name] in inspect.signature(node_class(node)).parameters for name, node in nodes.items()):
        raise ConfigError(f"prediction={class_name(cfg.prediction)} where nobody predicts: expected prediction=exact, "
                          "or policy=cost_based, fetch=cost, rejection=early, swap=cost or a class that asks for "
                          "costs")  # fmt: skip

"""Checks of a prediction that is off: somebody has to decide by it, if only an instance of one role."""

import inspect

from memserve.config.errors import ConfigError, class_name
from memserve.config.per_role import option_of_role
from memserve.config.schema import RunConfig
from memserve.config.targets import is_a, node_class

ASKING = {"policy": "cost_model", "decode_policy": "cost_model", "rejection": "cost_model"}


def check_prediction(cfg: RunConfig) -> None:
    """Raises ConfigError for any but the exact prediction where nobody predicts. cfg: of all roles, checked."""
    if is_a(cfg.prediction, "ExactPrediction") or not is_a(cfg.fetch, "NeverFetch"):
        return
    nodes = [(getattr(cfg, name), argument) for name, argument in ASKING.items()]
    nodes += [(option_of_role(cfg, role, "swap"), "costs") for role in cfg.cluster.roles]
    if not any(argument in inspect.signature(node_class(node)).parameters for node, argument in nodes):
        raise ConfigError(f"prediction={class_name(cfg.prediction)} where nobody predicts: expected prediction=exact, "
                          "or policy=cost_based, fetch=cost, rejection=early, swap=cost or a class that asks for "
                          "costs")  # fmt: skip

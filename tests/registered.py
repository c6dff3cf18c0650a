"""The classes that this package registers under a base: sweeps go over these, whatever tests define beside them."""

from vmoe_momentum.names import subclasses


def registered(base: type) -> dict[str, type]:
    """By name, as `subclasses` has them, without other modules': a test's own rule lives until it is collected."""
    return {name: cls for name, cls in subclasses(base).items() if cls.__module__.startswith("vmoe_momentum.")}

"""The model card of a directory for the hub: what it is, what it was trained on, how well it did, how to load it."""

from pathlib import Path

import yaml

from ..specs import describe
from .base import Metadata

TEXT = """---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, vmoe_momentum, mixture-of-experts]
---
# {title}

{what}

| | |
|---|---|
{facts}

## Recipe

```yaml
{recipe}```

## Scores

{scores}

## Use

```python
import timm, vmoe_momentum  # the import registers the architecture

model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
```

## Where it comes from

Exported by `vmoe-momentum export` from `{file}` ({weights} weights{step}). The files hold no code and no pickles.
"""


def write_card(folder: Path, metadata: Metadata) -> None:
    """README.md in `folder`."""
    network, source = metadata["network"], metadata["source"]
    settings = network.get("settings", {})
    rule, router = settings.get("rule"), settings.get("router")
    title = network["architecture"] + (f", {rule['class_path']}" if rule else "")
    what = "An image classifier in timm's format."
    if rule:
        what = (
            "A V-MoE vision transformer (arXiv:2106.05974): sparse layers route each token to a few expert MLPs; "
            f"between sparse layers the updates follow the momentum rule `{describe(rule)}` (MomentumSMoE, "
            "arXiv:2410.14574)."
        )
    rows = [
        ("classes", network["num_classes"]), ("input", f"{network['image_size']} x {network['image_size']} pixels"),
        ("rule", describe(rule) if rule else None), ("router", describe(router) if router else None),
        ("parameters", f"{metadata['parameters']:,}"), ("data", metadata["data"]),
    ]  # fmt: skip
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows if value)
    scores = metadata["scores"]
    told = "\n".join(f"- {name}: {value:.4f}" for name, value in scores.items()) if scores else "Not measured."
    step = f", epoch {source['epoch']}" if "epoch" in source else ""
    text = TEXT.format(
        title=title,
        what=what,
        facts=facts,
        scores=told,
        recipe=yaml.safe_dump(metadata["recipe"] or "not recorded"),
        file=source["file"],
        weights=source["weights"],
        step=step,
    )
    (folder / "README.md").write_text(text)

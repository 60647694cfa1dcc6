"""Draw results/rates.png from results/tuning.csv: what a branch rate costs with and without protection."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

RESULTS = Path(__file__).parent / "results"
LABELS = {"inflora": "InfLoRA", "sequential": "LoRA in sequence", "linear_probe": "frozen backbone"}


def main() -> None:
    runs = pd.read_csv(RESULTS / "tuning.csv")
    runs = runs[runs["other"].isna() & (runs["head_lr"] == 1e-2)]
    figure, panels = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axes, (column, title) in zip(panels, {"last_accuracy": "last accuracy", "forgetting": "forgetting"}.items(), strict=True):
        for method in ("inflora", "sequential"):
            found = runs[runs["method"] == method].sort_values("lr")
            axes.plot(found["lr"], found[column], marker="o", label=LABELS[method])
        axes.axhline(runs.set_index("method").loc["linear_probe", column], color="grey", linestyle=":", label=LABELS["linear_probe"])
        axes.set(title=f"{title} (%, held-out images)", xlabel="learning rate of the branches", xscale="log")
    panels[0].legend(frameon=False)
    figure.savefig(RESULTS / "rates.png", dpi=160)


if __name__ == "__main__":
    main()

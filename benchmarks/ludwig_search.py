"""The search of Ludwig for `benchmarks/ludwig_comparison.py`; runs in its environment, `.venv-ludwig`.

Prints the number of trials and the metrics of the best one as JSON.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pandas
from ludwig.hyperopt.run import hyperopt

SPLITS = ("train", "validation", "test")  # Ludwig numbers them


def main() -> None:
    """Search, and print the result."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="directory with train, validation and test")
    parser.add_argument("output", type=Path, help="directory for the results")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--trials", type=int, required=True)
    options = parser.parse_args()
    rows = [
        (str(file.absolute()), f"digit {file.parent.name}", number)
        for number, split in enumerate(SPLITS)
        for file in sorted((options.images / split).glob("*/*.png"))
    ]
    results = hyperopt(
        configuration(options),
        dataset=pandas.DataFrame(rows, columns=["image", "label", "split"]),
        output_directory=str(options.output),
        skip_save_processed_input=True,
        random_seed=options.seed,
    )
    best = results.experiment_analysis.get_best_trial(metric="metric_score", mode="min", scope="last")
    (directory,) = options.output.glob(f"hyperopt/*{best.trial_id}*/hyperopt_run")
    tested = json.loads((directory / "test_statistics.json").read_text())["label"]
    values = {"loss": best.last_result["metric_score"], "accuracy": tested["accuracy_micro"], "trials": options.trials}
    print(json.dumps(values | {"seconds": time.monotonic() - started}))


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """Return the network, the space and the sampler: those of topwork, in the terms of Ludwig."""
    layers = [{"num_filters": number, "filter_size": 3, "pool_size": 2} for number in (16, 32, 64)]
    return {
        "input_features": [
            {
                "name": "image",
                "type": "image",
                "preprocessing": {"height": 32, "width": 32, "num_channels": 3},
                "encoder": {"type": "stacked_cnn", "conv_layers": layers, "fc_layers": []},
            }
        ],
        "output_features": [{"name": "label", "type": "category"}],
        "preprocessing": {"split": {"type": "fixed", "column": "split"}},
        "trainer": {"epochs": options.epochs, "batch_size": 32},
        "backend": {"type": "local"},
        "hyperopt": {
            "goal": "minimize",
            "metric": "loss",
            "output_feature": "label",
            "split": "validation",
            "parameters": {
                "trainer.learning_rate": {"space": "loguniform", "lower": 1e-5, "upper": 1e-1},
                "label.decoder.fc_dropout": {"space": "uniform", "lower": 0.0, "upper": 0.7},
                "trainer.optimizer.type": {"space": "choice", "categories": ["adam", "sgd", "rmsprop"]},
            },
            "search_alg": {"type": "hyperopt", "random_state_seed": options.seed},
            "executor": {
                "type": "ray",
                "num_samples": options.trials,
                "cpu_resources_per_trial": 1,
                "max_concurrent_trials": 2,
            },
        },
    }


if __name__ == "__main__":
    main()

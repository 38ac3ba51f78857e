"""The digits MLP as a user of Keras writes it: python benchmarks/against/digits_keras.py FOLDER.

The network, split, batch size and optimiser of configs/digits_mlp.py:control. FOLDER gets the
checkpoint of the best epoch and the history; what the run was is printed as JSON.
"""

import json
import os
import sys

BATCH_SIZE, EPOCHS = 64, 40


def load() -> dict[str, tuple]:
    """Returns images and labels by split, 1,257 / 180 / 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x, y = digits.images[..., None].astype("float32") / 16, digits.target.astype("int32")
    rest, x_test, y_rest, y_test = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    x_train, x_val, y_train, y_val = train_test_split(
        rest, y_rest, test_size=180, stratify=y_rest, random_state=0
    )
    return {"train": (x_train, y_train), "val": (x_val, y_val), "test": (x_test, y_test)}


def main(folder: str) -> None:
    import keras

    splits = load()
    # Whole batches only: another size would be compiled for itself.
    x, y = splits["train"]
    whole = len(x) // BATCH_SIZE * BATCH_SIZE
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    best = os.path.join(folder, "best.keras")
    callbacks = [
        keras.callbacks.ModelCheckpoint(best, monitor="val_accuracy", save_best_only=True),
        keras.callbacks.CSVLogger(os.path.join(folder, "history.csv")),
    ]
    model.fit(
        *(x[:whole], y[:whole]),
        **dict(batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=2),
        **dict(validation_data=splits["val"], callbacks=callbacks),
    )
    steps = int(model.optimizer.iterations)
    model.load_weights(best)
    _, accuracy = model.evaluate(*splits["test"], batch_size=360, verbose=0)
    result = {"params": model.count_params(), "steps": steps, "test_accuracy": accuracy}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

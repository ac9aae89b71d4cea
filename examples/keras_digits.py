"""A Keras model, on handwritten digits, that is saved in the middle of its training."""

import os
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported

import keras

import fastopt.keras
from fastopt.cli import demo

(x, y), (x_test, y_test) = demo.digits()
keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.layers.Input((64,)),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
optimizer = fastopt.keras.adamw(
    keras.optimizers.schedules.CosineDecay(3e-3, 12 * 20),
    weight_decay=0.1,
    global_clipnorm=1.0,
)
optimizer.exclude_from_weight_decay(var_names=["bias"])
model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(x, y, batch_size=64, epochs=6, verbose=2)

with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder) / "digits.keras")
    model = keras.models.load_model(Path(folder) / "digits.keras")
print(f"loaded, with {int(model.optimizer.iterations)} steps done")
model.fit(x, y, batch_size=64, epochs=12, initial_epoch=6, verbose=2)

_, right = model.evaluate(x_test, y_test, verbose=0)
print(f"test accuracy: {right:.3f}")

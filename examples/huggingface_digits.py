"""Hugging Face's Trainer with our AdamW: a small vision transformer, from scratch, on
handwritten digits."""

import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from fastopt.torch import AdamW

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
x, x_test, y, y_test = train_test_split(images, labels, random_state=0)


def dataset(images, labels):
    pairs = zip(torch.from_numpy(images), labels.tolist(), strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


def accuracy(prediction):
    right = prediction.predictions.argmax(axis=1) == prediction.label_ids
    return {"accuracy": right.mean()}


set_seed(0)
config = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    num_labels=10,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
)
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        ViTForImageClassification(config),
        TrainingArguments(
            folder,
            num_train_epochs=12,
            per_device_train_batch_size=64,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            weight_decay=0.05,  # spares biases and norms, as always with Trainer
            logging_steps=66,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=dataset(x, y),
        eval_dataset=dataset(x_test, y_test),
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=(AdamW, {"lr": 3e-3, "betas": (0.9, 0.99)}),
    )
    trainer.train()
    print(f"test accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")

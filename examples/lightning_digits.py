"""Lightning's Trainer, our AdamW and a scheduler of torch's, on handwritten digits."""

import lightning
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from fastopt.torch import AdamW

EPOCHS, BATCH = 15, 64

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
x, x_test, y, y_test = map(
    torch.from_numpy, train_test_split(images, labels, random_state=0)
)


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
        )

    def training_step(self, batch, _):
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.layers(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = AdamW(self.parameters(), lr=1e-2, weight_decay=0.05)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-2, total_steps=self.trainer.estimated_stepping_batches
        )
        schedule = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


lightning.seed_everything(0)
model = Digits()
trainer = lightning.Trainer(
    accelerator="cpu",
    max_epochs=EPOCHS,
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(TensorDataset(x, y), BATCH, shuffle=True))
print(f"loss of the last epoch: {trainer.callback_metrics['loss']:.4f}")
with torch.no_grad():
    right = (model.layers(x_test).argmax(dim=1) == y_test).float().mean()
print(f"test accuracy: {right:.3f}")

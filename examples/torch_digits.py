"""PyTorch: only the import changes, and the losses stay.

    python examples/torch_digits.py

A small network learns digits twice: with torch.optim.AdamW and with fastopt.torch's,
under the same learning-rate scheduler.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastopt.torch

x, y = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(
    torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y), random_state=0
)


def trained(optimizer):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    )
    opt = optimizer(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-2, total_steps=300)
    losses = []
    for _ in range(300):
        rows = torch.randint(len(x_train), (128,))
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x_train[rows]), y_train[rows])
        loss.backward()
        opt.step()
        scheduler.step()
        losses.append(loss.item())
    return model, losses


_, theirs = trained(torch.optim.AdamW)
model, ours = trained(fastopt.torch.AdamW)
for step in (0, 99, 299):
    print(
        f"step {step + 1}: {theirs[step]:.4f} with torch, {ours[step]:.4f} with fastopt"
    )
with torch.no_grad():
    right = model(x_test).argmax(dim=1) == y_test
print(f"test accuracy: {right.float().mean():.3f}")

"""What a loss moves, and what training makes of it."""

import torch


def moved(model, images):
    """The parts of the model that the loss gives a gradient, after a backward pass."""
    model(images).losses["loss"].backward()
    parts = {"encoder": model.encoder, "decoder": model.decoder, "codes": model.quantizer}
    return {
        name
        for name, part in parts.items()
        if any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())
    }


def losses_of_training(model, images, steps=60):
    """The losses of each step of Adam on the same images."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    for _ in range(steps):
        seen = model(images)
        optimizer.zero_grad()
        seen.losses["loss"].backward()
        optimizer.step()
        history.append(seen.losses)
    return history

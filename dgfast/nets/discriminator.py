"""Noise-aware networks as guidance calls them: time t in [0, 1] instead of ADM's timesteps 0 to 999."""

from torch import Tensor, nn

from dgfast.nets.adm import EncoderUNetModel

_TIMESTEPS = 999  # both of DG's networks multiply t by this before the sinusoids


class NoisyClassifier(nn.Module):
    """An ADM classifier: (u [B, C, R, R] at VP scale, t [B] in [0, 1]) -> logits [B, classes]."""

    def __init__(self, encoder: EncoderUNetModel) -> None:
        super().__init__()
        self.encoder, self.classes = encoder, encoder.out_channels

    def forward(self, u: Tensor, t: Tensor) -> Tensor:
        return self.encoder(_cast(u, self.encoder), _TIMESTEPS * t)


class Discriminator(nn.Module):
    """DG's discriminator (arXiv 2211.17091): a small ADM encoder on the features of a frozen ADM classifier.

    (u [B, C, R, R] at VP scale, t [B] in [0, 1], class_labels [B, label_dim] or None) -> logit of "real" [B].

    Args:
        trunk: the classifier; None: the head reads the images themselves.
    """

    def __init__(self, trunk: EncoderUNetModel | None, head: EncoderUNetModel) -> None:
        super().__init__()
        if trunk is not None and (trunk.feature_channels, trunk.feature_size) != (head.in_channels, head.image_size):
            raise ValueError(
                f"the trunk's features are {trunk.feature_channels} x {trunk.feature_size} x {trunk.feature_size}, "
                f"the discriminator reads {head.in_channels} x {head.image_size} x {head.image_size}"
            )
        self.trunk, self.head = trunk, head

    def forward(self, u: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        timesteps = _TIMESTEPS * t
        labels = class_labels.argmax(dim=1) if self.head.num_classes and class_labels is not None else None
        features = _cast(u, self.head)
        if self.trunk is not None:
            features = self.trunk.features(features, timesteps)
        return self.head(features, timesteps, labels).squeeze(-1)


def _cast(u: Tensor, net: nn.Module) -> Tensor:
    return u.to(next(net.parameters()).dtype)

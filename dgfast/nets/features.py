"""A small classifier of clean images whose features the quality metrics compare."""

from torch import Tensor, nn


class FeatureNet(nn.Module):
    """Four strided convolutions, mean pooling, one linear layer.

    For small grey or colour images on which Inception's features say little. `features` are what stands before the
    last layer.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.in_channels, self.num_features = in_channels, 4 * channels
        layers: list[nn.Module] = []
        for cin, cout, stride in (
            (in_channels, channels, 1),
            (channels, 2 * channels, 2),
            (2 * channels, 4 * channels, 2),
            (4 * channels, 4 * channels, 2),
        ):
            layers += [nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(self.num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] in [-1, 1] -> features [B, 4 channels]."""
        return self.body(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] in [-1, 1] -> logits [B, num_classes]."""
        return self.out(self.features(images))

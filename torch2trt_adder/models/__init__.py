"""AdderNets as published: a LeNet for handwritten digits, ResNet-20 for CIFAR, ResNet-50 for ImageNet."""

from .mnist import AdderNetMnist, addernet_mnist
from .resnet import ResNet, resnet20, resnet50
from .twin import cnn_twin

__all__ = ["AdderNetMnist", "ResNet", "addernet_mnist", "cnn_twin", "resnet20", "resnet50"]

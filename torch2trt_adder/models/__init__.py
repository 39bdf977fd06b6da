"""AdderNets as published: a LeNet for handwritten digits, ResNet-20 for CIFAR, ResNet-50 for ImageNet."""

from .baseline import cnn_twin
from .mnist import AdderNetMnist, addernet_mnist
from .resnet import ResNet, resnet20, resnet50

__all__ = ["AdderNetMnist", "ResNet", "addernet_mnist", "cnn_twin", "resnet20", "resnet50"]

"""Which places in memory belong to a view: exactly its elements, not its storage."""

import numpy as np

MOST_LISTED = 2**24  # elements of an overlapping view, which are listed one by one


class Elements:
    """The elements of a view, each by its distance from the first one, counted in elements.

    Where the strides are nested, as those of every slice, permutation and expansion of a dense tensor are, a distance
    has at most one decomposition into them, so views of any size take no memory. Others (sliding windows) are listed.

    Raises ValueError for a view that is neither nested nor small.
    """

    def __init__(self, shape, strides):
        self.shape, self.strides = tuple(shape), tuple(strides)
        self.listed = None
        self.axes = []  # (size, stride) from the largest stride; axes that are one run are merged
        for stride, size in sorted((s, n) for n, s in zip(shape, strides) if n > 1 and s > 0):
            if self.axes and stride == self.axes[0][0] * self.axes[0][1]:
                size, stride = size * self.axes[0][0], self.axes.pop(0)[1]
            self.axes.insert(0, (size, stride))
        self.empty = 0 in self.shape
        self.last = sum((size - 1) * stride for size, stride in self.axes)
        extents = np.cumsum([0, *[(size - 1) * stride for size, stride in reversed(self.axes)]], dtype=object)
        if any(stride <= extent for (_, stride), extent in zip(reversed(self.axes), extents)):
            self.listed = self._list()

    def _list(self):
        if np.prod([size for size, _ in self.axes], dtype=object) > MOST_LISTED:
            raise ValueError(f"a view of shape {self.shape}, strides {self.strides} overlaps itself, too large to list")
        distances = np.zeros(1, np.int64)
        for size, stride in self.axes:
            distances = (distances[:, None] + np.arange(size) * stride).ravel()
        return np.unique(distances)

    def contain(self, distances):
        """Of an array of distances (int64): which are those of elements."""
        if self.empty:
            return np.zeros(distances.shape, bool)
        if self.listed is not None:
            return np.isin(distances, self.listed)
        inside = (distances >= 0) & (distances <= self.last)
        if [stride for _, stride in self.axes] in ([], [1]):
            return inside
        rest = distances
        for size, stride in self.axes:
            rest = rest - np.minimum(rest // stride, size - 1) * stride
        return inside & (rest == 0)

    def index(self, distance):
        """The coordinates of the element at a distance, 0 along axes of stride 0."""
        index = [0] * len(self.shape)
        for axis in sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis]):
            if self.shape[axis] > 1 and self.strides[axis] > 0:
                index[axis] = min(distance // self.strides[axis], self.shape[axis] - 1)
                distance -= index[axis] * self.strides[axis]
        return tuple(index)

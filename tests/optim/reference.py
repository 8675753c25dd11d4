"""Every kind of optimizer for one parameter, in float64 NumPy and after its paper."""

import numpy as np


def matrices(x, role):
    """[N, I, O] of a parameter whose role is (number of stacked dimensions, number of input dimensions)."""
    stacked, inputs = role
    sizes = x.shape[:stacked], x.shape[stacked : stacked + inputs], x.shape[stacked + inputs :]
    return x.reshape([int(np.prod(size)) for size in sizes])


class Reference:
    """Decoupled weight decay and a constant learning rate; a kind is a `direction`."""

    def __init__(self, start, role, config, decays):
        self.x = start.astype(np.float64)
        self.role, self.config = role, config
        self.decay = config.weight_decay if decays else 0.0
        self.t = 0
        self.m = np.zeros_like(self.x)
        self.v = np.zeros_like(self.x)

    def point(self):
        """Where the gradient is taken."""
        return self.x

    def update(self, grad):
        self.t += 1
        self.x = self.x - self.config.learning_rate * (self.direction(grad) + self.decay * self.x)


class Adam(Reference):
    def direction(self, grad):
        c = self.config
        self.m = c.b1 * self.m + (1 - c.b1) * grad
        self.v = c.b2 * self.v + (1 - c.b2) * grad**2
        m, v = self.m / (1 - c.b1**self.t), self.v / (1 - c.b2**self.t)
        return m / (np.sqrt(v) + c.eps)


class Lion(Reference):
    def direction(self, grad):
        c = self.config
        sign = np.sign(c.b1 * self.m + (1 - c.b1) * grad)
        self.m = c.b2 * self.m + (1 - c.b2) * grad
        return sign


class Momentum(Reference):
    def direction(self, grad):
        self.m = self.config.momentum * self.m + grad
        return self.m


class ScheduleFree(Reference):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.z, self.weight = self.x, 0.0

    def point(self):
        return (1 - self.config.b1) * self.z + self.config.b1 * self.x

    def update(self, grad):
        c, y = self.config, self.point()
        self.t += 1
        self.v = c.b2 * self.v + (1 - c.b2) * grad**2
        move = grad / (np.sqrt(self.v / (1 - c.b2**self.t)) + c.eps) + self.decay * y
        self.z = self.z - c.learning_rate * move
        self.weight += c.learning_rate**2
        share = c.learning_rate**2 / self.weight
        self.x = (1 - share) * self.x + share * self.z


class Adafactor(Reference):
    def direction(self, grad):
        b2 = 1 - self.t**-0.8
        if self.role is None:  # norms: every layer's on its own
            self.v = b2 * self.v + (1 - b2) * (grad**2 + 1e-30)
            rows = grad / np.sqrt(self.v)
            rms = np.sqrt((rows**2).mean(-1, keepdims=True))
            return rows / np.maximum(1, rms)
        g = matrices(grad, self.role)
        if self.t == 1:
            self.rows, self.columns = np.zeros(g.shape[:2]), np.zeros((len(g), g.shape[2]))
        self.rows = b2 * self.rows + (1 - b2) * (g**2 + 1e-30).mean(2)
        self.columns = b2 * self.columns + (1 - b2) * (g**2 + 1e-30).mean(1)
        v = np.einsum("ni,no->nio", self.rows, self.columns) / self.rows.mean(1)[:, None, None]
        u = g / np.sqrt(v)
        u = u / np.maximum(1, np.sqrt((u**2).mean((1, 2), keepdims=True)))
        return u.reshape(grad.shape)


class Muon(Reference):
    def direction(self, grad):
        beta = self.config.momentum
        self.m = beta * self.m + (1 - beta) * grad
        ahead = beta * self.m / (1 - beta ** (self.t + 1)) + (1 - beta) * grad / (1 - beta**self.t)
        return np.stack([self.scaled(x) for x in matrices(ahead, self.role)]).reshape(grad.shape)

    def scaled(self, x):
        x = x / np.linalg.norm(x)
        # On singular values, which is where the iteration acts.
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        rows, columns = x.shape
        if self.config.muon_scaling == "rms":
            return 0.2 * np.sqrt(max(rows, columns)) * (u * s) @ vt
        return np.sqrt(max(1, columns / rows)) * (u * s) @ vt


class Soap(Reference):
    def direction(self, grad):
        g, m = matrices(grad, self.role), matrices(self.m, self.role)
        if self.t == 1:
            self.sides = [(x @ x.T, x.T @ x) for x in (1 - self.config.b2) ** 0.5 * g]
            self.bases = [tuple(map(self.eigenbasis, pair)) for pair in self.sides]
            self.squares = np.zeros_like(g)
            return np.zeros_like(grad)
        pairs = [self.one(n, *pair) for n, pair in enumerate(zip(g, m, strict=True))]
        self.m = np.stack([new for _, new in pairs]).reshape(grad.shape)
        return np.stack([move for move, _ in pairs]).reshape(grad.shape)

    def one(self, n, g, m):
        """(move, new mean of the gradient) of matrix n."""
        c, step = self.config, self.t - 1
        left, right = self.bases[n]
        m = c.b1 * m + (1 - c.b1) * g
        self.squares[n] = c.b2 * self.squares[n] + (1 - c.b2) * (left.T @ g @ right) ** 2
        v = self.squares[n] / (1 - c.b2**step)
        move = left @ ((left.T @ m @ right) / (1 - c.b1**step) / (np.sqrt(v) + c.eps)) @ right.T
        old = self.sides[n]
        self.sides[n] = tuple(
            c.b2 * a + (1 - c.b2) * b for a, b in zip(old, (g @ g.T, g.T @ g), strict=True)
        )
        if step % c.basis_every == 0:
            self.bases[n] = tuple(
                q if len(q) > c.longest_basis else np.linalg.qr(side @ q)[0]
                for side, q in zip(self.sides[n], self.bases[n], strict=True)
            )
        return move, m

    def eigenbasis(self, side):
        if len(side) > self.config.longest_basis:
            return np.eye(len(side))
        return np.linalg.eigh(side)[1][:, ::-1]


KINDS = {
    "adamw": Adam,
    "muon": Muon,
    "soap": Soap,
    "adafactor": Adafactor,
    "lion": Lion,
    "sgd": Momentum,
    "schedule_free": ScheduleFree,
}

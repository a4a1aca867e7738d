"""The network of the graph surrogate: error amplitudes that meet along the data flow, energies read at the roots.

A layer errs with energy t = w[l] · v[o] · u[type, o] · e[l, o]^gamma, the term of the additive surrogate, hence with
amplitude sqrt(t). The cost is a sum over the roots of blocks,

    S = sum over blocks B of   n_B · (mean over l in B of sqrt(t_l)^p_B)^(2 / p_B)   +   sum_c q_Bc^2 / n_B

The first energy is a power mean over the block's n_B layers. Its p_B says whether errors are independent (p = 2: the
sum of the terms, the additive surrogate, which is what the network is before it learns), add up coherently (p = 1), or
the worst one drowns the others (p large). q_Bc is what signed channels carry to the root of the block by messages
h_v = own_v + sum_{u -> v} g[type of v, c] · h_u with own_v = z[type, c] · sqrt(t_v): errors of some layers may add up
and others cancel. Everything is homogeneous: terms k times as large give k times the cost. log fid_fp = a +
b · log(c + S), and every parameter is drawn to its prior's mean.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantdm.surrogates.additive_model import (
    Design,
    body_jacobian,
    body_size,
    head_of,
    log_terms,
    make_design,
    start_of,
)
from quantdm.surrogates.space import SearchSpace
from quantdm.surrogates.wiring import Wiring, wire

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
INDEPENDENT = 2.0  # the prior's mode of p
LOG_POWER_RANGE = 2.0  # p stays within a factor of e^2 of it: beyond 15 the worst error is all that counts
# Prior standard deviations, chosen on planted truths of four kinds (eval/planted_kinds.py): of log p over all blocks
# and per kind of block; of the amplitude that a type sends in a signed channel (and its mean, up to a sign); of the
# logarithms of gates and of what a block's channels weigh.
LOG_POWER_SD = {"all": 1.0, "kind": 0.3}
SIGNED_MEAN, SIGNED_SD, LOG_GATE_SD, LOG_BLOCK_SD = 0.3, 0.4, 0.3, 0.3
CHANNELS = 2


@dataclass(frozen=True, eq=False)
class Messages:
    """What the message parameters say: signed amplitudes at the root R [L, C], and p of every block [B]."""

    signed: Floats
    power: Floats


@dataclass(frozen=True, eq=False)
class Meeting:
    """What meets at the roots: amplitudes [T, L], q [T, B, C], powers [T, L], their sums and energies [T, B]."""

    amplitude: Floats
    signed: Floats
    powers: Floats
    total: Floats
    energy: Floats


@dataclass(frozen=True, eq=False)
class AmplitudeNet:
    """The network of one space, as `quantdm.surrogates.gauss_newton` fits it; theta = head, terms, messages."""

    design: Design
    wiring: Wiring
    mean: Floats  # [types, C]: prior means of the signed amplitudes; they differ, or channels would stay equal

    @property
    def slices(self) -> dict[str, slice]:
        """Return where the parts of the messages' parameters lie, counted from the end of the terms."""
        types, channels = self.mean.shape
        sizes = {
            "signed": types * channels,
            "gate": len(self.wiring.types) * channels,
            "block": len(self.wiring.blocks),
            "power": 1 + self.wiring.kinds.shape[1],
        }
        ends = np.cumsum([0, *sizes.values()])
        return {name: slice(int(a), int(b)) for name, a, b in zip(sizes, ends, ends[1:], strict=False)}

    def start(self, mean: float) -> Floats:
        """Return the prior's mode, with a = `mean`."""
        return start_of(body_size(self.design) + self.slices["power"].stop, mean)

    def messages(self, theta: Floats) -> Messages:
        """Return what the parameters say of messages."""
        own, block = self._own(theta)
        at = theta[body_size(self.design) :][self.slices["power"]]
        bent = LOG_POWER_SD["all"] * at[0] + LOG_POWER_SD["kind"] * (self.wiring.kinds @ at[1:])
        power = INDEPENDENT * np.exp(LOG_POWER_RANGE * np.tanh(bent / LOG_POWER_RANGE))
        return Messages(own * self._reach(self.path_gains(theta)) * block, power)

    def _own(self, theta: Floats) -> tuple[Floats, Floats]:
        """Return what every layer sends per amplitude [L, C], and what its block's channels weigh [L, 1]."""
        part = theta[body_size(self.design) :]
        own = self.mean + SIGNED_SD * part[self.slices["signed"]].reshape(self.mean.shape)
        block = np.exp(LOG_BLOCK_SD * (self.wiring.member @ part[self.slices["block"]]))
        return own[self.wiring.type_of], block[:, None]

    def path_gains(self, theta: Floats) -> Floats:
        """Return the product of the gates along every path [paths, C]."""
        gate = theta[body_size(self.design) :][self.slices["gate"]]
        return np.exp(LOG_GATE_SD * self.wiring.path_types @ gate.reshape(-1, self.mean.shape[1]))

    def _reach(self, gains: Floats) -> Floats:
        """Return what arrives at the root of one unit that a layer sends [L, C]: the sum over its paths."""
        found = np.zeros((len(self.wiring.type_of), gains.shape[1]))
        np.add.at(found, self.wiring.path_layer, gains)
        return found

    def log_fid(self, theta: Floats, choices: Ints) -> Floats:
        """Return log fid_fp = a + b · log(c + S): [T, L] -> [T]."""
        a, b, _, c = head_of(theta)
        alone, roots = self.energies(theta, choices)
        return a + b * np.log(c + alone.sum(axis=1) + roots.sum(axis=1))

    def energies(self, theta: Floats, choices: Ints) -> tuple[Floats, Floats]:
        """Return the energies of layers without a block [T, alone] and of the blocks' roots [T, B]; they sum to S."""
        log_term = self._log_term(theta, choices)
        meeting = self._meet(log_term, self.messages(theta))
        roots = meeting.energy + (meeting.signed**2).sum(axis=2) / self.wiring.size
        return np.exp(log_term[:, self.wiring.alone]), roots

    def _log_term(self, theta: Floats, choices: Ints) -> Floats:
        return log_terms(self.design, theta)[np.arange(choices.shape[1]), choices]

    def _meet(self, log_term: Floats, messages: Messages) -> Meeting:
        amplitude, member = np.exp(log_term / 2), self.wiring.member
        signed = np.stack([(amplitude * row) @ member for row in messages.signed.T], axis=2)
        powers = np.exp(log_term * (member @ messages.power) / 2) * member.any(axis=1)
        total = np.maximum(powers @ member, 1e-300)
        return Meeting(amplitude, signed, powers, total, power_energy(total, self.wiring.size, messages.power))

    def root_energy(self, block: int, log_term: Floats, messages: Messages) -> Floats:
        """Return the energy of one root from the log terms of its block's layers: [N, layers] -> [N]."""
        layers, power = list(self.wiring.blocks[block]), messages.power[block]
        total = np.exp(power * log_term / 2).sum(axis=1)
        signed = np.exp(log_term / 2) @ messages.signed[layers]
        return power_energy(np.maximum(total, 1e-300), np.array(len(layers)), power) + (signed**2).sum(axis=1) / len(
            layers
        )

    def jacobian(self, theta: Floats, choices: Ints) -> Floats:
        """Return d(log fid_fp) / d(theta): [T, parameters]."""
        _, b, _, c = head_of(theta)
        log_term, messages, member = self._log_term(theta, choices), self.messages(theta), self.wiring.member
        meeting, size = self._meet(log_term, messages), self.wiring.size
        alone = np.where(member.any(axis=1), 0.0, np.exp(log_term))
        total = c + alone.sum(axis=1) + (meeting.energy + (meeting.signed**2).sum(axis=2) / size).sum(axis=1)
        rate = (b / total)[:, None]
        arrived = [(q / size) @ member.T for q in np.moveaxis(meeting.signed, 2, 0)]  # at the root of every layer
        by_signed = np.stack([2 * rate * q * meeting.amplitude for q in arrived], axis=2)  # d / dR [T, L, C]
        part = rate * (alone + meeting.powers * ((meeting.energy / meeting.total) @ member.T))
        part += (by_signed * messages.signed).sum(axis=2) / 2
        body = body_jacobian(self.design, theta, choices, part, total)
        by_power = rate * self._by_power(log_term, meeting, messages)
        return np.concatenate([body, self._by_signed(theta, by_signed, messages), by_power], axis=1)

    def _by_signed(self, theta: Floats, by_signed: Floats, messages: Messages) -> Floats:
        """Carry d / dR [T, L, C] on to what R is made of: amplitudes per type, gates, blocks."""
        wiring, gains = self.wiring, self.path_gains(theta)
        own, block = self._own(theta)
        types = np.eye(len(self.mean))[wiring.type_of]
        sent = by_signed * (SIGNED_SD * self._reach(gains) * block)
        along = by_signed[:, wiring.path_layer] * ((own * block)[wiring.path_layer] * gains)
        found = [np.swapaxes(np.swapaxes(sent, 1, 2) @ types, 1, 2)]
        found.append(LOG_GATE_SD * np.swapaxes(np.swapaxes(along, 1, 2) @ wiring.path_types, 1, 2))
        found.append(LOG_BLOCK_SD * (by_signed * messages.signed).sum(axis=2) @ wiring.member)
        return np.concatenate([part.reshape(len(by_signed), -1) for part in found], axis=1)

    def _by_power(self, log_term: Floats, meeting: Meeting, messages: Messages) -> Floats:
        """Return dS / d(what p is made of): [T, 1 + kinds]."""
        inner = (meeting.powers * log_term) @ self.wiring.member / meeting.total  # mean log term, weighted by the power
        bend = meeting.energy * (inner + 2 / messages.power * np.log(self.wiring.size / meeting.total))  # dE / d log p
        bend = bend * (1 - (np.log(messages.power / INDEPENDENT) / LOG_POWER_RANGE) ** 2)
        whole = bend.sum(axis=1, keepdims=True)
        return np.concatenate([LOG_POWER_SD["all"] * whole, LOG_POWER_SD["kind"] * bend @ self.wiring.kinds], axis=1)


def power_energy(total: Floats, size: Floats | int, power: Floats | float) -> Floats:
    """Return n · (total / n)^(2/p): the power mean's energy from the sum of powers `total` over n layers."""
    return size * (total / size) ** (2 / power)


def make_net(space: SearchSpace) -> AmplitudeNet:
    """Build the network of a space. The first channel starts coherent, the others with signs that tell types apart."""
    wiring = wire(space)
    types = int(wiring.type_of.max()) + 1
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(types, CHANNELS))
    signs[:, 0] = 1.0
    return AmplitudeNet(make_design(space), wiring, SIGNED_MEAN * signs)

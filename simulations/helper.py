"""The helper of a simulation's two-server mode, in the same process and with keys of the run's seed.

Not a second operator: whoever runs the simulation has both halves. It is the same role as deployed,
and what is asked and answered goes through the wire form.
"""

from dataclasses import dataclass, replace

from fedoppu.common.config import FederationConfig
from fedoppu.common.errors import UsageError
from fedoppu.common.messages import (
    read_mask_request,
    read_mask_sum,
    write_mask_request,
    write_mask_sum,
)
from fedoppu.common.randomness import Randomness
from fedoppu.common.roster import Roster
from fedoppu.common.two_server import MaskSum, MaskSumRequest
from fedoppu.server.helper import Helper, HelperLink, HelperPolicy, HelperSecrets, HelperService
from fedoppu.simulations.key_source import GridMarker, SeededKeySource, simulation_grid

HELPER = -1  # no member's index: its keys are its own


def pinned_helper(config: FederationConfig, randomness: Randomness) -> FederationConfig:
    """The config with the public keys of the simulation's helper; unchanged in graph mode.

    Args:
        config: Of the federation.
        randomness: Root of the run.

    Raises:
        UsageError: The settings name a helper.
    """
    if config.secagg.helper:
        raise UsageError(
            "secagg.helper cannot be set in a simulation, which makes its own helper",
            hint="leave it out",
        )
    if config.secagg.mode != "two_server":
        return config
    with simulation_grid() as marker:  # only the public keys leave it
        keys = _secrets(config, randomness, marker).public()
    return replace(config, secagg=replace(config.secagg, helper=keys.text()))


def simulated_helper(
    config: FederationConfig, roster: Roster, randomness: Randomness, *, marker: GridMarker
) -> HelperLink | None:
    """A link to the helper that the config pins; None in graph mode.

    Args:
        config: Of the federation.
        roster: All members.
        randomness: Root of the run.
        marker: Of the Grid that it lives in.
    """
    if config.secagg.mode != "two_server":
        return None
    secrets = _secrets(config, randomness, marker)
    helper = Helper(secrets, roster, config, policy=HelperPolicy(floor=2, corrupt=0))
    # like its clients, it forgets with the process: a killed run is replayed from the seed
    return LocalLink(HelperService(helper, save=lambda dump: None))


def _secrets(config: FederationConfig, randomness: Randomness, marker: GridMarker) -> HelperSecrets:
    source = SeededKeySource(randomness, HELPER, marker)
    return HelperSecrets.make(source.secret, hybrid=config.secagg.key_exchange == "hybrid")


@dataclass(frozen=True)
class LocalLink:
    """A HelperLink that carries everything through the wire form.

    Attributes:
        service: The helper.
    """

    service: HelperService

    def ask(self, request: MaskSumRequest) -> MaskSum:
        """The helper's answer."""
        answer = self.service.ask(read_mask_request(write_mask_request(request)))
        return read_mask_sum(write_mask_sum(answer))

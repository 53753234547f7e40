"""What holders say of their dealers: a complaint names a dealer whose share its sender does not hold.

A complaint is signed, in a masked update, before anybody is asked to unmask. It takes a share out
of the count and never brings one in, so it reveals nothing, to whomever; a false one costs what a
missing reply of its sender would. With at most `corrupt` liars among the members:

- a dealer of whom more than `corrupt` members complain has lied to one of them at least;
- a member that complains of more than `corrupt` dealers has lied of one of them at least.

Between these nobody is named, for it may be either of the two. With none assumed corrupt, a member
is believed one complaint.
"""

from collections.abc import Collection, Mapping

Complaints = Mapping[int, tuple[int, ...]]


def without_complainers(live: Collection[int], owner: int, complaints: Complaints) -> set[int]:
    """Those of `live` that may hold a share of the owner's secrets."""
    return {member for member in live if owner not in complaints.get(member, ())}


def judge(complaints: Complaints, corrupt: int) -> dict[int, str]:
    """Who lied for certain, and what it did.

    Args:
        complaints: By sender.
        corrupt: Members assumed corrupt.
    """
    most = max(corrupt, 1)
    faults = {
        member: f"complained of {len(dealers)} dealers, at most {most} can have lied"
        for member, dealers in complaints.items()
        if len(dealers) > most
    }
    believed = {member: of for member, of in complaints.items() if member not in faults}
    for dealer in sorted({dealer for of in believed.values() for dealer in of}):
        holders = sorted(member for member, of in believed.items() if dealer in of)
        if len(holders) > corrupt:
            faults.setdefault(dealer, f"dealt no good share to {len(holders)} members")
    return faults

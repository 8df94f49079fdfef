"""What people type who come from other trainers, and what it is here."""


def foreign(option: str) -> str:
    return ""

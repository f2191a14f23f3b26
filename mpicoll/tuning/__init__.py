"""The rules of ``algorithm="auto"``, the profiles that hold them, and how rules are made from measurements."""

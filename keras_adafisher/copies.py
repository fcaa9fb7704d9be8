"""Copies of objects that differ in one attribute."""


def with_attribute(instance, name, value):
    """A second object of the same class, with the same attributes but one.

    For calls of methods that read an attribute which isn't to be changed, not
    even for the length of the call: another thread may be in it.

    Args:
        instance: Object. It stays as it is.
        name: String, the attribute's name.
        value: What the attribute is in the copy. It isn't checked.

    Returns:
        The copy, which shares all other attributes with `instance`.
    """
    copy = object.__new__(type(instance))
    copy.__dict__.update(instance.__dict__)
    copy.__dict__[name] = value
    return copy

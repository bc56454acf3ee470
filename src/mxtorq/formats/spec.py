"""The card of MXFP4: every constant of the format, at one address.

Source: OCP Microscaling Formats (MX) Specification v1.0, section 5.2 (formats), 5.3.3 (E2M1),
5.4.1 (E8M0) and 6.3 (conversion). Every other file imports these names.
"""

BLOCK = 32
"""Elements that share one scale, contiguous along the input features (the last axis)."""

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitude of element codes 0 to 7; codes 8 to 15 are the same with a minus sign."""

E2M1_SIGN = 8
"""The sign bit of a 4-bit element code."""

E2M1_CUTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between neighbouring magnitudes. A value *on* a cut goes to the even code."""

E2M1_EMAX = 2
"""Exponent of the largest power of two in E2M1 (4.0); the OCP scale is 2^(floor(log2 amax) - 2)."""

E8M0_BIAS = 127
"""A scale byte b stands for 2^(b - 127)."""

E8M0_MAX = 254
"""The largest byte that is a number (2^127)."""

E8M0_NAN = 255
"""The byte that stands for NaN, and makes its whole block NaN."""

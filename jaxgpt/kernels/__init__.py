"""Operations: the plain reference of each, then its variants for a platform."""

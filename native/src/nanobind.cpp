// The binding library, compiled here so that it belongs to the domain of MLX.

#include "nb_combined.cpp"

// As module.cpp: the object files of both modules lie in one folder.
#include "module.cpp"

// What the programs share that play TensorRT: checks that count, and a shape calculator.
#pragma once

#include <stdio.h>
#include <stdlib.h>

#include <deque>

#include "tensorrt/abi.h"

inline int checks = 0, failures = 0;

#define CHECK(condition)                                            \
  do {                                                              \
    ++checks;                                                       \
    if (!(condition)) {                                             \
      ++failures;                                                   \
      printf("FAILED %s:%d: %s\n", __FILE__, __LINE__, #condition); \
    }                                                               \
  } while (0)

// For what the rest cannot do without.
#define REQUIRE(condition)                                          \
  do {                                                              \
    ++checks;                                                       \
    if (!(condition)) {                                             \
      printf("FAILED %s:%d: %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                      \
    }                                                               \
  } while (0)

template <typename Extent>
class Calculator : public nvinfer1::ExprBuilderOf<Extent> {
 public:
  using Expr = nvinfer1::DimensionExprOf<Extent>;
  Calculator() { this->mImpl = &mImplementation; }

  // An extent of an input, constant or known only at run time.
  Expr const* extent(Extent value, bool isConstant) {
    mValues.emplace_back(value, isConstant);
    return &mValues.back();
  }
  // From now on, `operations` operations succeed and all others give null.
  void fail_after(int32_t operations) { mFailAfter = operations; }
  static Extent value(Expr const& expr) { return static_cast<Value const&>(expr).number(); }

 private:
  class Value : public Expr {
   public:
    Value(Extent value, bool isConstant) : mImplementation(value, isConstant) { this->mImpl = &mImplementation; }
    Extent number() const { return mImplementation.mValue; }

   private:
    struct Implementation : Expr::Impl {
      Implementation(Extent value, bool isConstant) : mValue(value), mIsConstant(isConstant) {}
      bool isConstant() const noexcept override { return mIsConstant; }
      Extent getConstantValue() const noexcept override { return mIsConstant ? mValue : Extent{-12345}; }
      Extent mValue;
      bool mIsConstant;
    };
    Implementation mImplementation;
  };

  struct Implementation : nvinfer1::ExprBuilderOf<Extent>::Impl {
    explicit Implementation(Calculator* owner) : mOwner(owner) {}
    Expr const* constant(Extent value) noexcept override { return mOwner->extent(value, true); }
    Expr const* operation(nvinfer1::DimensionOperation op, Expr const& first, Expr const& second) noexcept override {
      Extent const a = Calculator::value(first), b = Calculator::value(second);
      bool const isConstant = first.isConstant() && second.isConstant();
      Extent result = 0;
      switch (op) {  // sums and products beyond the type wrap around
        case nvinfer1::DimensionOperation::kSUM: (void)__builtin_add_overflow(a, b, &result); break;
        case nvinfer1::DimensionOperation::kSUB: (void)__builtin_sub_overflow(a, b, &result); break;
        case nvinfer1::DimensionOperation::kPROD: (void)__builtin_mul_overflow(a, b, &result); break;
        case nvinfer1::DimensionOperation::kFLOOR_DIV:
          if (b < 1) return nullptr;
          result = a / b - (a % b != 0 && a < 0);
          break;
        default: return nullptr;
      }
      if (mOwner->mFailAfter == 0) return nullptr;
      if (mOwner->mFailAfter > 0) --mOwner->mFailAfter;
      return mOwner->extent(result, isConstant);
    }
    Calculator* mOwner;
  };

  int32_t mFailAfter = -1;
  std::deque<Value> mValues;
  Implementation mImplementation{this};
};
